"""The simulator: right kernels give NumPy's results."""

import numpy as np
import pytest
import simulated_kernels as kernels
from simulated_arrays import RNG, nan, normal, operands
from tvm.script import tirx as T

from im2win_tvm.simulate import Conflicts, SimulationError, run


def test_integer_arithmetic_is_c_s():
    @T.prim_func
    def kernel(x: T.Buffer((64,), "int32"), y: T.Buffer((16, 64), "int32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([64])
        v: T.let = x[t]
        y[0, t] = v // 7
        y[1, t] = v % 7
        y[2, t] = T.truncdiv(v, 7)
        y[3, t] = T.truncmod(v, 7)
        y[4, t] = v * 1000003 + 12345
        y[5, t] = (v << 3) ^ (v >> 2) & 0xFF | 5
        y[6, t] = ~v
        y[7, t] = T.max(T.min(v, 100), -100)
        y[8, t] = T.Cast("int32", T.Cast("uint32", v) >> T.uint32(28))
        y[9, t] = T.if_then_else(v == 0, 0, 1000 // v)
        y[10, t] = T.Select(v < 0, t, -t)
        y[11, t] = T.Cast("int32", T.Cast("float32", v) * T.float32(0.37))
        y[12, t] = T.reinterpret("int32", T.Cast("float32", v))
        y[13, t] = T.Cast("int32", T.Cast("int64", v) * T.int64(1 << 20) >> T.int64(33))
        y[14, t] = T.truncdiv(v, -3) // -2
        y[15, t] = T.Cast("int32", (v < 5 and v > -5) or not v < 1000)

    x = RNG.integers(-(2**31), 2**31, 64).astype("int32")
    x[:24] = np.arange(24) - 12
    y = np.zeros((16, 64), "int32")
    run(kernel, {"x": x, "y": y})
    v, t = x.astype("int64"), np.arange(64)
    with np.errstate(all="ignore"):
        safe = np.where(v == 0, 1, v)
        expected = [
            v // 7,
            v % 7,
            np.sign(v) * (abs(v) // 7),
            np.fmod(v, 7),
            v * 1000003 + 12345,
            (v << 3) ^ ((v >> 2) & 0xFF) | 5,
            -1 - v,
            v.clip(-100, 100),
            (v & 0xFFFFFFFF) >> 28,
            np.where(v == 0, 0, 1000 // safe),
            np.where(v < 0, t, -t),
            (x.astype("float32") * np.float32(0.37)).astype("int32"),
            x.astype("float32").view("int32"),
            v >> 13,
            (-np.sign(v) * (abs(v) // 3)) // -2,
            (abs(v) < 5) | (v >= 1000),
        ]
    for row, (actual, wanted) in enumerate(zip(y, expected, strict=True)):
        np.testing.assert_array_equal(actual, wanted.astype("int32"), f"row {row}")


def test_float_arithmetic_rounds_at_every_operation():
    @T.prim_func
    def kernel(x: T.Buffer((2, 64), "float32"), y: T.Buffer((5, 64), "float32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([64])
        z: T.float32 = T.float32(0)
        y[0, t] = x[0, t] * x[1, t] + T.float32(1)
        y[1, t] = T.fma(x[0, t], x[1, t], T.float32(1))
        T.ptx["fma.rn.f32"](z, x[0, t], x[1, t], T.float32(1))
        y[2, t] = z
        y[3, t] = T.exp(x[0, t]) / x[1, t]
        y[4, t] = T.Cast("float32", T.Cast("float16", x[0, t]))

    x, y = normal(2, 64), nan(5, 64)
    run(kernel, {"x": x, "y": y})
    a, b = x
    fused = (a.astype("float64") * b + 1).astype("float32")
    np.testing.assert_array_equal(y[0], a * b + np.float32(1))
    np.testing.assert_array_equal(y[1:3], [fused, fused])
    np.testing.assert_array_equal(y[3], np.exp(a) / b)
    np.testing.assert_array_equal(y[4], a.astype("float16"))
    assert (y[0] != fused).any()


def test_loops_end_for_each_thread_on_its_own():
    @T.prim_func
    def kernel(y: T.Buffer((5, 64), "int32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([64])
        n: T.int32 = 0
        for i in T.serial(t % 5):
            n = n + i + 1
        y[0, t] = n
        n = 0
        for i in T.serial(10):
            if i == t % 7:
                continue
            if i > t % 9:
                break
            n = n + i
        y[1, t] = n
        n = t
        while n > 3:
            n = n // 2
        y[2, t] = n
        if t % 2 == 0:
            T.thread_return()
        y[3, t] = t

    y = np.full((5, 64), -1, "int32")
    run(kernel, {"y": y})
    for t in range(64):
        summed = sum(i for i in range(10) if i != t % 7 and i <= t % 9)
        while_ = t
        while while_ > 3:
            while_ //= 2
        odd = t if t % 2 else -1
        assert [*y[:, t]] == [sum(range(t % 5 + 1)), summed, while_, odd, -1]


def test_loads_of_lanes_that_do_not_execute_do_not_count():
    @T.prim_func
    def kernel(x: T.Buffer((40,), "float32"), y: T.Buffer((64,), "float32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([64])
        if t < 40 and x[t] > 0.0:
            y[t] = x[t]
        else:
            y[t] = T.if_then_else(t < 40, -x[t], 0.0)

    x, y = normal(40), nan(64)
    run(kernel, {"x": x, "y": y})
    np.testing.assert_array_equal(y, [*abs(x), *[0] * 24])


def test_vectors():
    @T.prim_func
    def kernel(
        x: T.Buffer((64,), "float32"),
        w: T.Buffer((16, 4), "float32"),
        y: T.Buffer((64,), "float32"),
    ):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([16])
        four = T.alloc_local((4,), "float32")
        flat = T.decl_buffer((64,), "float32", data=w.data)
        for e in T.vectorized(4):
            four[e] = x[t * 4 + e] * T.Select(e < 2, T.float32(2), T.float32(3))
        four[3] = four[3] + flat[t]
        y[T.ramp(t * 4, 1, 4)] = four[T.ramp(0, 1, 4)] + T.broadcast(T.float32(1), 4)
        for e in T.vectorized(4):
            if e == 1:
                y[t * 4 + e] = four[e] + w[t, e]

    x, w, y = normal(64), normal(16, 4), nan(64)
    run(kernel, {"x": x, "w": w, "y": y})
    four = x.reshape(16, 4) * np.float32([2, 2, 3, 3])
    four[:, 3] += w.ravel()[:16]
    expected = four + np.float32(1)
    expected[:, 1] = four[:, 1] + w[:, 1]
    np.testing.assert_array_equal(y.reshape(16, 4), expected)


def test_identifiers_of_scopes():
    @T.prim_func
    def kernel(y: T.Buffer((7, 8, 96), "int32")):
        T.device_entry()
        bx, by = T.cta_id([4, 2])
        cx, cy = T.cta_id_in_cluster([2, 2])
        tx, ty = T.thread_id([48, 2])
        warp = T.warp_id([3])
        lane = T.lane_id([32])
        b: T.let = by * 4 + bx
        t: T.let = ty * 48 + tx
        y[0, b, t] = cx
        y[1, b, t] = cy
        y[2, b, t] = bx
        y[3, b, t] = by
        y[4, b, t] = tx + 100 * ty
        y[5, b, t] = warp
        y[6, b, t] = lane

    y = np.full((7, 8, 96), -1, "int32")
    for lanes in (1, 8192):  # a cluster at a time, and all at once
        run(kernel, {"y": y}, lanes=lanes)
        b, t = np.mgrid[:8, :96]
        values = [b % 2, b // 4, b % 4, b // 4, t % 48 + 100 * (t // 48), t // 32, t % 32]
        np.testing.assert_array_equal(y, values)


def test_shuffles_atomics_and_a_barrier_of_a_warp():
    def make(barrier):
        @T.prim_func
        def kernel(x: T.Buffer((64,), "float32"), y: T.Buffer((2,), "float32")):
            T.device_entry()
            T.cta_id([1])
            t = T.thread_id([64])
            tile = T.alloc_shared((64,), "float32")
            tile[t] = x[t]
            if barrier:
                T.cuda.warp_sync()
            total: T.float32 = tile[t // 32 * 32 + 31 - t % 32]
            total = total + T.cuda.__shfl_xor_sync(T.uint32(0xFFFFFFFF), total, 16, 32)
            total = total + T.tvm_warp_shuffle_down(T.uint32(0xFFFFFFFF), total, 8, 32, 32)
            if t % 32 < 8:
                T.ptx["red.global.add.f32"](y.ptr_to([t % 2]), total)

        return kernel

    x, y = np.arange(64, dtype="float32"), np.zeros(2, "float32")
    run(make(True), {"x": x, "y": y})
    np.testing.assert_array_equal(y, [x[1::2].sum(), x[::2].sum()])
    message = "tile.*wrote|read of a word that block 0 thread 31 wrote, no barrier between"
    with pytest.raises(SimulationError, match=message):
        run(make(False), {"x": x, "y": y})


def test_staged():
    x, y = normal(192), nan(192)
    report = run(kernels.staged(), {"x": x, "y": y})
    np.testing.assert_array_equal(y.reshape(3, 64), x.reshape(3, 64)[:, ::-1])
    assert report == (1, 0, 0, {})
    with pytest.raises(SimulationError, match="thread 63 wrote, no barrier between") as error:
        run(kernels.staged(barrier=False), {"x": x, "y": y})
    fault = error.value
    assert fault.statement == "y[block * 64 + thread] = tile[63 - thread]"
    assert (fault.block, fault.thread, fault.address) == ((0, 0, 0), (0, 0, 0), 252)
    with pytest.raises(SimulationError, match=r"barrier in divergent code: not reached by .* 48"):
        run(kernels.staged(whole=False), {"x": x, "y": y})


@pytest.mark.parametrize("per_block", [True, False])
def test_barriers_in_a_loop(per_block):
    @T.prim_func
    def kernel(y: T.Buffer((4, 32), "float32")):
        T.device_entry()
        block = T.cta_id([4])
        t = T.thread_id([32])
        tile = T.alloc_shared((32,), "float32")
        tile[t] = T.Cast("float32", t)
        for _ in T.serial(block if per_block else t):
            T.cuda.cta_sync()
            held: T.let = tile[(t + 1) % 32]
            T.cuda.cta_sync()
            tile[t] = held
        y[block, t] = tile[t]

    y = nan(4, 32)
    if per_block:
        run(kernel, {"y": y})
        np.testing.assert_array_equal(y, (np.arange(32) + np.arange(4)[:, None]) % 32)
    else:
        with pytest.raises(SimulationError, match="barrier in divergent code: not reached by"):
            run(kernel, {"y": y})


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_product(stages):
    given = operands()
    report = run(kernels.product(stages), given, conflicts=True)
    a, b = (given[name].reshape(kernels.K, -1).astype("float64") for name in "ab")
    np.testing.assert_allclose(given["y"], a.T @ b, rtol=1e-4, atol=1e-5)
    tiles = (kernels.M // kernels.BLOCK) * (kernels.N // kernels.BLOCK)
    assert report.copied_bytes == tiles * kernels.K * kernels.BLOCK * 2 * 4
    assert report.barriers == kernels.K // kernels.STEP
    assert not any(conflicts.extra for conflicts in report.conflicts.values())


def test_copies_fill_with_zeros():
    @T.prim_func
    def kernel(x: T.Buffer((100,), "float32"), y: T.Buffer((128,), "float32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([32])
        tile = T.alloc_shared((128,), "float32", align=16)
        left: T.let = T.max(0, T.min(4, 102 - t * 4))
        T.ptx["cp.async.cg.shared.global"](
            tile.ptr_to([t * 4]), x.ptr_to([t * 4]), 16, T.Cast("uint32", left * 4)
        )
        T.ptx["cp.async.wait_all"]()
        for e in T.vectorized(4):
            y[t * 4 + e] = tile[t * 4 + e]

    y = nan(128)
    with pytest.raises(SimulationError, match="x: 8 bytes outside its 400: by block 0 thread 25"):
        run(kernel, {"x": normal(100), "y": y})


@pytest.mark.parametrize("bytes_of_source", [0, 4, 8, 12])
def test_copies_read_no_more_than_they_are_told(bytes_of_source):
    @T.prim_func
    def kernel(x: T.Buffer((4,), "float32"), y: T.Buffer((8,), "float32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([2])
        tile = T.alloc_shared((8,), "float32", align=16)
        wanted: T.let = T.if_then_else(t == 0, T.uint32(bytes_of_source), T.uint32(0))
        T.ptx["cp.async.ca.shared.global"](tile.ptr_to([t * 4]), x.ptr_to([t * 1000]), 16, wanted)
        T.ptx["cp.async.commit_group"]()
        T.ptx["cp.async.wait_group"](0)
        for e in T.vectorized(4):
            y[t * 4 + e] = tile[t * 4 + e]

    x, y = normal(4), nan(8)
    run(kernel, {"x": x, "y": y})
    n = bytes_of_source // 4
    np.testing.assert_array_equal(y, [*x[:n], *[0] * (8 - n)])


def test_cluster():
    x, y = normal(8, 32), nan(64)
    report = run(kernels.shared_sums(), {"x": x, "y": y})
    np.testing.assert_allclose(y.reshape(2, 32), x.reshape(2, 4, 32).sum(1), rtol=1e-5, atol=1e-6)
    assert report.cluster_barriers == 2


def test_memory_of_a_cluster_through_generic_addresses():
    def make(barrier):
        @T.prim_func
        def kernel(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
            T.device_entry()
            block = T.cta_id([2])
            T.cta_id_in_cluster([2])
            t = T.thread_id([8])
            tile = T.alloc_shared((32,), "float32", align=128)
            four = T.alloc_local((4,), "float32")
            for e in T.vectorized(4):
                four[e] = x[block * 32 + t * 4 + e]
            there: T.uint64 = T.uint64(0)
            T.ptx["mapa.u64"](there, tile.ptr_to([t * 4]), T.Cast("uint32", 1 - block))
            T.cuda.cluster_sync()
            T.ptx["st.v4.f32"](there, four[0], four[1], four[2], four[3])
            if barrier:
                T.cuda.cluster_sync()
            T.ptx["ld.shared.v4.f32"](four[0], four[1], four[2], four[3], tile.ptr_to([t * 4]))
            for e in T.vectorized(4):
                y[block * 32 + t * 4 + e] = four[e]
            T.cuda.cluster_sync()

        return kernel

    x, y = normal(64), nan(64)
    run(make(True), {"x": x, "y": y})
    np.testing.assert_array_equal(y, np.roll(x, 32))
    with pytest.raises(SimulationError, match="block 1 thread 0 wrote, no barrier between"):
        run(make(False), {"x": x, "y": y})


def test_what_was_never_written_reads_as_nan_where_allowed():
    @T.prim_func
    def kernel(y: T.Buffer((2, 32), "float32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([32])
        tile = T.alloc_shared((32,), "float32")
        local = T.alloc_local((1,), "float32")
        y[0, t] = tile[t]
        if t < 5:
            local[0] = 1.0
        y[1, t] = local[0]

    y = np.zeros((2, 32), "float32")
    run(kernel, {"y": y}, uninitialised=True)
    assert np.isnan(y[0]).all() and np.isnan(y[1, 5:]).all() and (y[1, :5] == 1).all()


@pytest.mark.parametrize(("pitch", "extra"), [(32, 31), (33, 0), (34, 1)])
def test_bank_conflicts(pitch, extra):
    @T.prim_func
    def kernel(y: T.Buffer((32, 32), "float32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([32])
        tile = T.alloc_shared((32, pitch), "float32")
        for i in T.serial(32):
            tile[i, t] = T.Cast("float32", i * t)
        T.cuda.cta_sync()
        for i in T.serial(32):
            y[i, t] = tile[t, i]

    y = nan(32, 32)
    report = run(kernel, {"y": y}, conflicts=True)
    np.testing.assert_array_equal(y, np.outer(np.arange(32), np.arange(32)))
    written, read = (report.conflicts[key] for key in sorted(report.conflicts))
    assert (written, read) == (Conflicts(32, 0), Conflicts(32 + 32 * extra, 32 * extra))
