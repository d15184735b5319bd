"""The simulator: warps that have roles and wait for each other, and what goes wrong among them."""

import ml_dtypes
import numpy as np
import pytest
import simulated_roles as kernels
import tvm
from simulated_arrays import nan, normal
from tvm.script import tirx as T

from im2win_tvm.simulate import SimulationError, run

RNG = np.random.default_rng(1)


def whole(*shape):
    """Numbers of few bits: every product and sum of them is exact."""
    return RNG.integers(-4, 5, shape).astype("float32")


def pipeline_arrays():
    x = whole(kernels.WIDTH, kernels.CHANNELS)
    f = whole(kernels.TAPS, kernels.CHANNELS, kernels.M)
    y = nan(kernels.M, kernels.PIXELS)
    return x, f, {"x": x.astype("float16"), "f": kernels.pack(f), "y": y}


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_producers_and_consumers(stages):
    """Two copying threads, in two warps of one warpgroup, that do not wait for each other; with
    padding, steps and a ragged row of channels."""
    x, f, arrays = pipeline_arrays()
    run(kernels.pipeline(stages=stages), arrays)
    padded = np.zeros((2 * kernels.PIXELS + kernels.TAPS, kernels.CHANNELS), "float32")
    padded[kernels.PAD : kernels.PAD + kernels.WIDTH] = x
    end = kernels.PIXELS * kernels.STRIDE
    expected = sum(f[t].T @ padded[t : t + end : kernels.STRIDE].T for t in range(kernels.TAPS))
    np.testing.assert_array_equal(arrays["y"], expected)


PIPELINE_FAULTS = {
    "full": r"wgmma's read of a word that a copy counted by mbarrier full\[0\], not waited for",
    "parity": r"wgmma's read of a word that a copy counted by mbarrier full\[0\], not waited for",
    "empty": r"nobody can go on: .* thread 0 for parity 0 of mbarrier empty\[0\], whose phase 0 "
    r"lacks 8 of 8 arrivals; .*deadlock",
    "early": "copy into a word that a wgmma of block 0 warpgroup 1 reads",
    "bytes": r"mbarrier full\[0\]: 16 bytes more than its phase expects",
    "fence": r"mbarrier full\[0\]: no fence shows copies that it was initialised",
    "sync": r"mbarrier full\[0\]: nothing orders its initialisation before its use",
    "sums": r"sums\[0\]: read of what a wgmma, not waited for, is to fill",
}


@pytest.mark.parametrize("fault", PIPELINE_FAULTS)
def test_faults_of_a_pipeline(fault):
    with pytest.raises(SimulationError, match=PIPELINE_FAULTS[fault]):
        run(kernels.pipeline(fault), pipeline_arrays()[2])


MAPS = {
    "stride": ({"stride": kernels.CHANNELS * 2 + 8}, "strides of .*: allowed are multiples of 16"),
    "box": ({"box": (kernels.ROW, 257)}, "a box of .*: allowed are 1 to 256"),
    "steps": ({"steps": (1, 9)}, "steps of .*: allowed are 1 to 8"),
    "row": ({"box": (60, 8)}, "rows of 120 bytes, not a multiple of 16"),
    "span": ({"swizzle": 2}, "rows of 128 bytes, more than the 64 of the swizzle"),
    "end": ({"stride": kernels.CHANNELS * 2 + 16}, "ends at byte .* of the array"),
    "bytes": ({"box": (kernels.ROW, 10)}, "phase 0 lacks 0 of 1 arrivals and .* bytes"),
}


@pytest.mark.parametrize("which", MAPS)
def test_tensor_maps_that_are_wrong(which):
    options, message = MAPS[which]
    with pytest.raises(SimulationError, match=message):
        run(kernels.pipeline(**options), pipeline_arrays()[2])


def test_warpgroups_that_take_turns():
    y = np.zeros(1, "int32")
    run(kernels.ping_pong(4), {"y": y})
    assert y == [12121212]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no wait", "(read|write) of a word that block 0 thread .* (wrote|read), no barrier"),
        ("one more", r"nobody can go on: .* for parity . of mbarrier turn\[1\]"),
        ("count", r"5 arrivals at mbarrier turn\[1\], whose phase 0 lacks 4 of 4 arrivals"),
    ],
)
def test_faults_of_turns(fault, message):
    with pytest.raises(SimulationError, match=message):
        run(kernels.ping_pong(5, fault), {"y": np.zeros(1, "int32")})


def test_named_barriers():
    x, y = normal(256), nan(384)
    report = run(kernels.named(), {"x": x, "y": y})
    np.testing.assert_array_equal(y, np.concatenate([x[127::-1], x[:127:-1], x[:128]]))
    assert report.barriers == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("own", "read of a word that block 0 thread .* wrote, no barrier between"),
        ("sync", "read of a word that block 0 thread .* wrote, no barrier between"),
        ("arrive", "nobody can go on: .* for barrier 5 of 256 threads, of whom 128 came"),
        ("count", "barrier 5 of 128 threads, of 256 for others"),
    ],
)
def test_faults_of_named_barriers(fault, message):
    with pytest.raises(SimulationError, match=message):
        run(kernels.named(fault), {"x": normal(256), "y": nan(384)})


@pytest.mark.parametrize("first_barrier", ["", "relaxed"])
def test_a_sum_over_a_cluster(first_barrier):
    x, y = whole(2, 512), nan(2, 512)
    run(kernels.cluster_sum(first_barrier), {"x": x, "y": y})
    np.testing.assert_array_equal(y, 3 * x)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("born", "shared memory of another block before a cluster barrier shows that it runs"),
        ("ready", "read of a word (that block 1 thread 0 wrote|never written)"),
        ("leave", "block 1 may have left the cluster, no barrier keeps it"),
    ],
)
def test_faults_of_a_sum_over_a_cluster(fault, message):
    with pytest.raises(SimulationError, match=message):
        run(kernels.cluster_sum(fault), {"x": whole(2, 512), "y": nan(2, 512)})


def bits(array, kind):
    if kind == "tf32":  # the lower bits of a float32 do not count
        return array.view("uint32") | 0x1FFF
    return array.astype({"f16": "float16", "bf16": ml_dtypes.bfloat16}[kind]).view("uint16")


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
@pytest.mark.parametrize(("n", "first", "apart"), [(8, 0, 8), (16, 3, 10), (24, 13, 9)])
def test_rows_from_any_row_on(kind, n, first, apart):
    width = 32 if kind == "tf32" else 64
    a, b = whole(64, width), whole(first + n // 8 * apart, width)
    y = nan(64, n)
    arrays = {"a": bits(a, kind), "b": bits(b, kind), "y": y}
    run(kernels.shifted(kind, n, first, apart), arrays)
    rows = [first + i // 8 * apart + i % 8 for i in range(n)]
    np.testing.assert_array_equal(y, a @ b[rows].T)


def test_faults_of_operands_that_threads_wrote():
    arrays = {"a": bits(whole(64, 64), "f16"), "b": bits(whole(23, 64), "f16"), "y": nan(64, 16)}
    with pytest.raises(SimulationError, match=r"wrote, no fence\.proxy\.async between"):
        run(kernels.shifted("f16", fenced=False), arrays)
    with pytest.raises(SimulationError, match="read of a register never written"):
        run(kernels.shifted("f16", adds=True), arrays)


def lifecycle(which):
    """A warp and an mbarrier of one arrival."""

    @T.prim_func
    def kernel(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([64])
        tile = T.alloc_shared((64,), "float32", align=128)
        bar = T.alloc_shared((2,), "uint64", align=8)
        state: T.uint64 = T.uint64(0)
        done: T.uint32 = T.uint32(0)
        if t == 0:
            T.ptx.mbarrier.init.shared.b64(bar.ptr_to([0]), T.uint32(1))
            T.ptx.fence.proxy.async_.shared__cta()
            if which == "twice":
                T.ptx.mbarrier.init.shared.b64(bar.ptr_to([0]), T.uint32(1))
        T.cuda.cta_sync()
        if which == "never":
            T.cuda.mbarrier_wait(bar.ptr_to([1]), 0)
        if which == "overwritten":
            if t == 0:
                bar[0] = T.uint64(0)
        if t == 0:
            T.ptx.mbarrier.arrive.expect_tx.shared.b64(bar.ptr_to([0]), T.uint32(256))
            if which != "short":
                T.ptx[kernels.COPY](
                    tile.ptr_to([1 if which == "unaligned" else 0]), x.ptr_to([0]),
                    T.uint32(252 if which == "size" else 256), bar.ptr_to([0]))  # fmt: skip
        if which != "unwaited" and which != "short":
            T.ptx.mbarrier.try_wait.parity.shared.b64(done, bar.ptr_to([0]), T.uint32(0))
            y[t] = tile[t] * T.Cast("float32", done)
        if which == "again":
            if t == 0:
                T.ptx[kernels.COPY](
                    tile.ptr_to([0]), x.ptr_to([0]), T.uint32(256), bar.ptr_to([0]))  # fmt: skip
        if which == "state":
            if t < 1:
                T.ptx.mbarrier.arrive.shared.b64(state, bar.ptr_to([0]), T.uint32(1))
                T.ptx.mbarrier.try_wait.shared.b64(done, bar.ptr_to([0]), state)

    return kernel


LIFE = {
    "twice": r"init of the live mbarrier bar\[0\] by block 0 thread 0",
    "never": "no mbarrier was initialised there: access by block 0 thread 0",
    "overwritten": r"write of a word of mbarrier bar\[0\]",
    "short": r"the kernel ends while mbarrier bar\[0\], whose phase 0 lacks 0 of 1 arrivals and "
    "256 bytes",
    "unwaited": r"the kernel ends, nobody waited for mbarrier bar\[0\]: copy by block 0 thread 0",
    "again": r"copy into a word that block 0 thread 1 read, no barrier between",
    "unaligned": "tile: 16 bytes not aligned to them: by block 0 thread 0 at byte 4",
    "size": r"a bulk copy of 252 bytes",
}


def test_waits_that_are_tried():
    x, y = normal(64), nan(64)
    run(lifecycle("state"), {"x": x, "y": y})
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("which", LIFE)
def test_the_life_of_an_mbarrier(which):
    with pytest.raises(SimulationError, match=LIFE[which]):
        run(lifecycle(which), {"x": normal(64), "y": nan(64)})


def boxes(box, steps, corner, swizzle, dtype, tf32=False):
    """y = a box of x, of three axes, as it lies in shared memory."""
    count = int(np.prod([box[0], *(-(-b // s) for b, s in zip(box[1:], steps[1:], strict=True))]))
    size = np.dtype(dtype).itemsize
    numbers = [*map(T.int64, (64, 5, 6, 64 * size, 5 * 64 * size)), *map(T.int32, (*box, *steps))]

    def encode(variable, data):
        return tvm.tirx.tensormap_encode_tiled(
            variable, data, *numbers, descriptor_dtype=dtype, rank=3, swizzle=swizzle,
            force_cu_dtype=11 if tf32 else -1)  # fmt: skip

    @T.prim_func
    def kernel(x: T.Buffer((6, 5, 64), dtype), y: T.Buffer((count,), dtype)):
        x_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode(x_map, x.data))
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([32])
        tile = T.alloc_shared((count,), dtype, align=1024)
        full = T.alloc_shared((1,), "uint64", align=8)
        if T.cuda.elect_sync() != T.uint32(0):
            T.ptx.mbarrier.init.shared.b64(full.ptr_to([0]), T.uint32(1))
            T.ptx.fence.mbarrier_init.release.cluster()
            T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([0]), T.uint32(count * size))
            T.ptx[kernels.COPY_2D.replace("2d", "3d")](
                tile.ptr_to([0]), T.address_of(x_map), *corner, full.ptr_to([0]))  # fmt: skip
        T.cuda.warp_sync()
        T.cuda.mbarrier_wait(full.ptr_to([0]), 0)
        for i in T.serial(count // 32):
            y[i * 32 + t] = tile[i * 32 + t]

    return kernel, count


@pytest.mark.parametrize(
    ("dtype", "row", "swizzle"),
    [
        ("float16", 64, 3),
        ("float16", 32, 2),
        ("bfloat16", 16, 1),
        ("float32", 32, 3),
        ("float16", 16, 0),
    ],
)
def test_boxes_of_a_tensor(dtype, row, swizzle):
    corner, steps = (40, -1, -3), (1, 2, 1)
    kernel, count = boxes((row, 5, 6), steps, corner, swizzle, dtype)
    dtype = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    x = normal(6, 5, 64).astype(dtype)
    y = np.full(count, np.nan).astype(dtype)
    run(kernel, {"x": x, "y": y})
    padded = np.zeros((20, 20, 200), dtype)
    padded[5:11, 5:10, 5:69] = x
    c, n, m = (5 + first for first in corner)
    rows = padded[m : m + 6, n : n + 5 : 2, c : c + row].reshape(
        -1, row * dtype.itemsize // 16, 16 // dtype.itemsize
    )
    span = {0: 1, 1: 2, 2: 4, 3: 8}[swizzle]
    expected = np.empty_like(rows)
    for r in range(len(rows)):
        for chunk in range(rows.shape[1]):
            # By the number of the 128 bytes that the chunk lies in.
            line = r * rows.shape[1] * 16 // 128
            expected[r, chunk ^ line % span if swizzle else chunk] = rows[r, chunk]
    np.testing.assert_array_equal(y.astype("float32"), expected.ravel().astype("float32"))


def test_a_map_that_rounds():
    kernel, count = boxes((32, 5, 6), (1, 1, 1), (0, 0, 0), 0, "float32", tf32=True)
    x, y = normal(6, 5, 64), nan(count)
    run(kernel, {"x": x, "y": y})
    bits = x[:, :, :32].ravel().view("uint32").astype("int64")
    assert (y.view("uint32") & 0x1FFF == 0).all()
    assert (abs(y.view("uint32").astype("int64") - bits) <= 0x1000).all()


def test_registers_that_some_warps_give_back():
    @T.prim_func
    def kernel(y: T.Buffer((128,), "float32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([128])
        if t < 96:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](40)
        T.ptx.bar.sync(T.uint32(1), T.uint32(128))
        y[t] = 0.0

    with pytest.raises(SimulationError, match="setmaxnreg by a part of a warpgroup: not reached"):
        run(kernel, {"y": nan(128)})


def test_copies_out_of_shared_memory():
    x, y, z = whole(4, 32), nan(4, 32), nan(3, 60)
    run(kernels.copied_out(), {"x": x, "y": y, "z": z})
    np.testing.assert_array_equal(y, 2 * x)
    np.testing.assert_array_equal(z, 3 * np.hstack([x, x])[:3, :60])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("fence", r"a bulk copy reads a word that .* wrote, no fence\.proxy\.async between"),
        ("sync", "a bulk copy's read of a word that block 0 thread 1 wrote, no barrier between"),
        ("wait", "write of a word that a bulk copy of block 0 thread 0 reads, not waited for"),
        ("read", "z: read of a word that a bulk copy of block 0 thread 0 fills, not waited for"),
        ("end", "the kernel ends, its thread did not wait until this was read: copy by block 0"),
    ],
)
def test_faults_of_copies_out_of_shared_memory(fault, message):
    with pytest.raises(SimulationError, match=message):
        run(kernels.copied_out(fault), {"x": whole(4, 32), "y": nan(4, 32), "z": nan(3, 60)})


def test_warps_of_a_warpgroup_with_products_take_no_roles():
    @T.prim_func
    def kernel(y: T.Buffer((64, 8), "float32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([128])
        tile = T.alloc_shared((64 * 64,), "float16", align=1024)
        bar = T.alloc_shared((1,), "uint64", align=8)
        sums = T.alloc_local((4,), "float32")
        if t == 0:
            T.ptx.mbarrier.init.shared.b64(bar.ptr_to([0]), T.uint32(1))
        T.cuda.cta_sync()
        if t == 0:
            T.cuda.mbarrier_wait(bar.ptr_to([0]), 0)
        if t == 32:
            T.ptx.mbarrier.arrive.shared.b64(bar.ptr_to([0]), T.uint32(1))
        at: T.let = T.uint64((1 << 62) | (64 << 32) | (1 << 16)) + T.Cast(
            "uint64", T.cuda.cvta_generic_to_shared(tile.ptr_to([0])) // 16)  # fmt: skip
        T.ptx["wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16"](
            sums[0], sums[1], sums[2], sums[3], at, at, False, 1, 1, 0, 0
        )
        y[t // 2, 0] = sums[0]

    message = "deadlock .* or warps of a warpgroup with wgmma wait for each other, which is not sim"
    with pytest.raises(SimulationError, match=message):
        run(kernel, {"y": nan(64, 8)})
