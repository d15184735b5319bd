"""What `cuda_thin` is made of, and what of the simulator it alone needs, each by itself."""

import ml_dtypes
import numpy as np
import pytest
import quick_macros  # noqa: F401
from tvm.script import tirx as T

from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules.cuda_thin_filter import channel_of_row, rounded, runs
from im2win_tvm.schedules.cuda_thin_loads import Elements, Words
from im2win_tvm.schedules.cuda_thin_tiles import Config, Geometry, registers
from im2win_tvm.schedules.cuda_thin_window import Window
from im2win_tvm.schedules.hopper import Position, Ring
from im2win_tvm.simulate import SimulationError, run

RNG = np.random.default_rng(5)
KINDS = {
    "float16": ("k16.f32.f16.f16", 16, (0,)),
    "bfloat16": ("k16.f32.bf16.bf16", 16, (0,)),
    "float32": ("k8.f32.tf32.tf32", 8, ()),
}


def product(dtype, n, touch=False):
    """y = a b^T: a of two steps of K in registers, b in shared memory.

    touch: a register of a is written before the product is waited for.
    """
    kind, k, transposed = KINDS[dtype]
    WIDTH, PER_WORD = 128 // np.dtype(dtype).itemsize, k // 8

    # fmt: off
    @T.prim_func
    def kernel(
        a: T.Buffer((64, 2 * k // PER_WORD), "uint32"), b: T.Buffer((n, WIDTH), dtype),
        y: T.Buffer((64, n), "float32"),
    ):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([128])
        pool = T.SMEMPool()
        right = Ring(pool, 1, n * 128, 4)
        right.place_barriers(pool)
        pool.commit()
        at = Position(1)
        at.start()
        if t == 0:
            right.init()
            T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.cta_sync()
        if t == 0:
            right.expect(at, n * 128)
            right.copy(at, b.ptr_to([0, 0]), n * 128)
        right.wait(at)
        sums = T.alloc_local((n // 2,), "float32")
        held = T.alloc_local((8,), "uint32")
        for i in T.unroll(8):
            held[i] = a[t // 32 * 16 + i % 2 * 8 + t % 32 // 4, i // 2 * 4 + t % 4]
        view: T.let = right.descriptor(8, 0)
        T.ptx.wgmma.fence.sync.aligned()
        for s in T.unroll(2):
            T.ptx[f"wgmma.mma_async.sync.aligned.m64n{n}{kind}"](
                *[sums[i] for i in range(n // 2)], *[held[s * 4 + r] for r in range(4)],
                view + T.Cast("uint64", s * 2), s > 0, 1, 1, *transposed)
        T.ptx.wgmma.commit_group.sync.aligned()
        if touch:
            held[5] = T.uint32(0)
        T.ptx.wgmma.wait_group.sync.aligned(0)
        held[5] = T.uint32(0)
        for e in T.unroll(n // 2):
            y[t // 32 * 16 + t % 32 // 4 + e % 4 // 2 * 8,
              e // 4 * 8 + t % 4 * 2 + e % 2] = sums[e]
    # fmt: on

    return kernel


def numbers(shape, dtype):
    """Of few bits: every product and sum of them is exact."""
    return RNG.integers(-8, 9, shape).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize(("dtype", "n"), [("float16", 24), ("bfloat16", 8), ("float32", 16)])
def test_products_with_a_in_registers(dtype, n):
    width, k = 128 // np.dtype(dtype).itemsize, 2 * KINDS[dtype][1]
    a, b = numbers((64, k), dtype), numbers((n, width), dtype)
    row = np.arange(n)[:, None]
    swizzled = b.reshape(n, 8, width // 8)[row, np.arange(8) ^ row % 8].reshape(n, width)
    y = np.full((64, n), np.nan, "float32")
    words = np.ascontiguousarray(a).view("uint32")
    run(product(dtype, n), {"a": words, "b": np.ascontiguousarray(swizzled), "y": y})
    expected = a.astype("float64") @ b[:, :k].astype("float64").T
    np.testing.assert_array_equal(y, expected)


def test_registers_of_a_product_are_left_alone_until_it_is_waited_for():
    a, b = numbers((64, 32), "float16"), numbers((8, 64), "float16")
    arrays = {"a": a.view("uint32"), "b": b, "y": np.full((64, 8), np.nan, "float32")}
    with pytest.raises(SimulationError, match=r"held\[5\]: written while a wgmma, not waited for"):
        run(product("float16", 8, touch=True), arrays)


def views(offset):
    """y = the second part of shared memory by bytes, seen from an offset of the whole."""

    # fmt: off
    @T.prim_func
    def kernel(y: T.Buffer((32,), "uint16")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([32])
        pool = T.SMEMPool()
        first = pool.alloc((16,), "uint32", align=16)
        second = pool.alloc((16,), "uint32", align=16)
        pool.commit()
        seen = T.decl_buffer((32,), "uint16", data=second.data,
                             elem_offset=second.elem_offset * 2 if offset else 0)
        if t < 16:
            first[t] = T.uint32(1)
            second[t] = T.uint32(2)
        T.cuda.cta_sync()
        y[t] = seen[t]
    # fmt: on

    return kernel


@pytest.mark.parametrize(("offset", "value"), [(True, 2), (False, 1)])
def test_a_view_of_a_part_of_shared_memory_begins_where_all_of_it_does(offset, value):
    y = np.zeros(32, "uint16")
    run(views(offset), {"y": y})
    np.testing.assert_array_equal(y, np.tile([value, 0], 16))


def geometry(layout="NHWC", dtype="float16", channels=None, **fields):
    sizes = dict(batch=2, in_channels=3, input_size=(12, 150), out_channels=8, kernel_size=3)
    problem = ConvProblem(**{**sizes, **fields}, layout=layout, dtype=dtype)
    return Geometry(problem, Config(8, 1, channels or problem.in_channels, 2, 8))


def rows(g, kind, off):
    """The ring after one warpgroup has brought a row that begins at an element, and padding.

    off: the array begins an element after a multiple of 16 bytes.
    """
    BITS = "uint16" if g.problem.itemsize == 2 else "uint32"
    COUNT, WORDS = int(np.prod(g.problem.input_shape)), g.ring_bytes // 4
    ALIGNED = g.problem.itemsize if off else 16

    # fmt: off
    @T.prim_func
    def kernel(
        x_ptr: T.handle, element: T.Buffer((1,), "int32"), y: T.Buffer((WORDS,), "uint32")
    ):
        x = T.match_buffer(x_ptr, (COUNT,), g.problem.dtype, align=ALIGNED)
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([128])
        bits = T.decl_buffer((COUNT,), BITS, data=x.data)
        pool = T.SMEMPool()
        before = pool.alloc((8,), "uint32", align=16)
        ring = pool.alloc((WORDS,), "uint32", align=16)
        pool.commit()
        if t < 8:
            before[t] = T.uint32(0)
        for i in T.serial((WORDS + 127) // 128):
            if i * 128 + t < WORDS:
                ring[i * 128 + t] = T.uint32(0)
        T.cuda.cta_sync()
        loads = kind(g, ring, bits, t)
        begin: T.let = element[0]
        for part in T.serial(loads.parts):
            loads.load(1, 0, part, begin, T.bool(True))
            loads.load(1, 1, part, begin, T.bool(False))
            loads.store(1, 0, part, 1)
            loads.store(1, 1, part, 3)
        T.cuda.cta_sync()
        for i in T.serial((WORDS + 127) // 128):
            if i * 128 + t < WORDS:
                y[i * 128 + t] = ring[i * 128 + t]
    # fmt: on

    return kernel


def expected_row(g, x, begin):
    """The columns that outputs read, channels of a pixel filled up, then the second copy of it."""
    p = g.problem
    if p.channels_last:
        line = x[begin:][: g.input_columns * p.in_channels].reshape(-1, p.in_channels)
    else:
        plane = g.height * g.width
        starts = range(begin, begin + p.in_channels * plane, plane)
        line = np.stack([x[start:][: g.input_columns] for start in starts], axis=1)
    whole = np.zeros((g.class_columns * g.classes, g.config.channels), x.dtype)
    whole[g.left : g.left + g.input_columns, : p.in_channels] = line
    by_class = whole.reshape(-1, g.classes, g.config.channels).transpose(1, 0, 2)
    place = np.zeros((g.pitch * g.per_word,), x.dtype)
    words = (g.class_words + g.copies - 1) * g.per_word
    for copy in range(g.copies):
        for c, elements in enumerate(by_class):
            start = copy * g.copy_words * g.per_word + c * words + copy
            place[start : start + elements.size] = elements.ravel()
    return place


ROWS = {
    "words": dict(padding=0),
    "words, second copy": dict(padding=0, stride=1),
    "words beside padding": dict(padding=1, stride=2),
    "words beside padding, second copy": dict(padding=((1, 1), (3, 2))),
    "words of a short row": dict(input_size=(12, 4), stride=2),
    "words of pixels that are words": dict(in_channels=4, padding=1),
    "words, many": dict(in_channels=12, input_size=(3, 700), kernel_size=1, stride=3),
    "words, cut": dict(input_size=(12, 151), stride=7),
    "elements, filled up": dict(channels=4, padding=1),
    "elements of classes": dict(channels=4, dilation=(1, 3), padding=2),
    "elements, NCHW": dict(layout="NCHW", padding=2, stride=2),
    "elements, NCHW, second copy": dict(layout="NCHW", padding=((1, 1), (2, 3))),
    "elements, NCHW, many": dict(layout="NCHW", in_channels=12, input_size=(3, 700), kernel_size=1),
    "elements of four bytes": dict(dtype="float32", padding=((1, 1), (2, 3))),
}


@pytest.mark.parametrize("off", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_ring(name, off):
    """Wherever they begin, the tensor's first and last one too; nothing is read beyond it."""
    g = geometry(**ROWS[name])
    assert g.by_words == name.startswith("words")
    x = RNG.integers(1, 2**15, int(np.prod(g.problem.input_shape)))
    x = x.astype("uint16") if g.problem.itemsize == 2 else (x << 13).astype("uint32")
    line = g.width * (g.in_channels if g.problem.channels_last else 1)
    last = (g.batch - 1) * g.height * line * (1 if g.problem.channels_last else g.in_channels)
    kernel = rows(g, Words if g.by_words else Elements, off)
    for begin in (0, line, last + (g.height - 1) * line):
        ring = np.full(g.ring_bytes // 4, 7, "uint32")
        element = np.array([begin], "int32")
        run(kernel, {"x": x.view(g.problem.dtype), "element": element, "y": ring})
        ring = ring.view(x.dtype).reshape(-1, g.pitch * g.per_word)
        expected = expected_row(g, x, begin)
        where = [1, 1 + g.ring_rows] if g.mirrored > 1 else [1]
        if not g.problem.padding[1] or g.by_words:
            # What lies beyond the row is read by no window, or masked by it.
            used = (g.left + g.input_columns) * g.config.channels
            for copy in range(g.copies):
                start = copy * g.copy_words * 2 + copy
                for row in where:
                    np.testing.assert_array_equal(
                        ring[row][start:][:used], expected[start:][:used], f"{begin}"
                    )
        else:
            for row in where:
                np.testing.assert_array_equal(ring[row], expected, f"{begin}")
        assert not ring[[r for r in range(len(ring)) if r not in where]].any()


def words(g):
    """y = for each thread of a pixel the words of K that it has, its window from word 1 on."""
    FOURS = g.k_steps * 2
    WORDS = g.pitch * (g.window_rows + 1)

    # fmt: off
    @T.prim_func
    def kernel(x: T.Buffer((WORDS,), "uint32"), y: T.Buffer((32, FOURS), "uint32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([32])
        window = Window(g)
        window.start(t % 4)
        for four in T.unroll(FOURS):
            y[t, four] = window.load(x, 1, four)
    # fmt: on

    return kernel


@pytest.mark.parametrize(
    "fields",
    [
        dict(kernel_size=11, stride=4),
        dict(kernel_size=7, stride=2),
        dict(kernel_size=3, channels=4),
        dict(kernel_size=3),
        dict(kernel_size=(5, 1), in_channels=1),
        dict(kernel_size=(5, 3), in_channels=1),
        dict(kernel_size=(4, 5), in_channels=1, dilation=(2, 1)),
        dict(kernel_size=(7, 2), in_channels=2),
        dict(kernel_size=(3, 5), dtype="float32"),
        dict(kernel_size=(3, 1), dtype="float32", in_channels=1),
        dict(kernel_size=1, in_channels=1),
    ],
    ids=str,
)
def test_a_window_is_its_rows_in_order(fields):
    g = geometry(**fields)
    ring = (np.arange(g.pitch * (g.window_rows + 1)) + 1).astype("uint32") * 0x10001
    y = np.zeros((32, g.k_steps * 2), "uint32")
    run(words(g), {"x": ring, "y": y})
    expected = np.zeros(g.k_steps * 8, "uint32")
    at = 0
    for u in range(g.taps_h):
        row = ring[1 + u * g.step_h * g.pitch :][: g.row_words].copy()
        if g.odd:
            row[-1] &= 0xFFFF
        expected[at : at + g.row_words] = row
        at += g.row_words
    for t in range(32):
        np.testing.assert_array_equal(y[t], expected.reshape(-1, 4)[:, t % 4])


@pytest.mark.parametrize("block_n", [8, 24, 32, 40, 56, 96, 104])
@pytest.mark.parametrize(
    ("layout", "dtype"), [("NHWC", "float16"), ("NHWC", "float32"), ("NCHW", "float16")]
)
def test_a_thread_s_columns_are_runs_of_channels(block_n, layout, dtype):
    problem = ConvProblem(1, 3, (9, 9), block_n, 3, dtype=dtype, layout=layout)
    g = Geometry(problem, Config(block_n, 1, 3, 1, 8))
    channel = [int(channel_of_row(g, row)) for row in range(block_n)]
    assert sorted(channel) == list(range(block_n))
    for t in range(4):
        for first, count in runs(g):
            mine = [channel[(first + j) * 8 + t * 2 + e] for j in range(count) for e in range(2)]
            start = first * 8 + 2 * count * t
            assert mine == list(range(start, start + 2 * count))


def test_registers_of_a_block_are_those_it_was_launched_with():
    for warpgroups in (1, 2, 3, 4):
        for blocks in (1, 2, 3, 4):
            config = Config(8, warpgroups, 3, 1, 2, 1, blocks)
            given = registers(config)
            threads = config.threads * blocks
            assert given.launched * threads <= 65536 or given.launched < 24
            assert given.producer + warpgroups * given.consumer <= given.launched * (warpgroups + 1)


def test_rounding_to_tf32():
    values = np.array(
        [1 + 2**-11, 1 + 2**-10, 1 + 3 * 2**-11, -1 - 2**-11, np.inf, -np.inf, np.nan, 1e-45],
        "float32",
    )
    bits = np.concatenate([values.view("uint32"), np.array([0x7F800001, 0xFF800001], "uint32")])

    # fmt: off
    @T.prim_func
    def kernel(x: T.Buffer((len(bits),), "uint32"), y: T.Buffer((len(bits),), "uint32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([32])
        if t < len(bits):
            y[t] = rounded(x[t])
    # fmt: on

    y = np.zeros_like(bits)
    run(kernel, {"x": bits, "y": y})
    found = (y & np.uint32(0xFFFFE000)).view("float32")
    np.testing.assert_array_equal(found[:4], [1 + 2**-10, 1 + 2**-10, 1 + 2**-9, -1 - 2**-10])
    np.testing.assert_array_equal(found[4:8], [np.inf, -np.inf, np.nan, 0])
    assert np.isnan(found[8:]).all()
