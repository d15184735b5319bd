"""What `cuda_thin` is made of, and what of the simulator it alone needs, each by itself."""

import ml_dtypes
import numpy as np
import pytest
from tvm.script import tirx as T

import im2win_tvm.parsing  # noqa: F401
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import cuda_thin_rows
from im2win_tvm.schedules.cuda_thin_copies import Copier, Slots
from im2win_tvm.schedules.cuda_thin_filter import channel_of_row, rounded, runs
from im2win_tvm.schedules.cuda_thin_loads import Elements
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


def rows(g, off):
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
        loads = Elements(g, ring, bits, t)
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


ELEMENTS = {
    "filled up": dict(channels=6, in_channels=5, padding=1),
    "classes": dict(channels=4, dilation=(1, 3), padding=2),
    "NCHW": dict(layout="NCHW", padding=2, stride=2),
    "NCHW, second copy": dict(layout="NCHW", padding=((1, 1), (2, 3))),
    "NCHW, many": dict(layout="NCHW", in_channels=12, input_size=(3, 700), kernel_size=1),
    "wide rows": dict(dtype="float32", in_channels=12, input_size=(3, 700), kernel_size=1),
}
# What the tensor and a misalignment of it bring out is the same for all elements.
OFF = pytest.mark.parametrize("off", [pytest.param(False, marks=pytest.mark.slow), True])


def some_bits(g):
    """Elements of x as bits, all of them different from zero, and exact in tf32."""
    x = RNG.integers(1, 2**15, int(np.prod(g.problem.input_shape)))
    return x.astype("uint16") if g.problem.itemsize == 2 else (x << 13).astype("uint32")


@OFF
@pytest.mark.parametrize("name", ELEMENTS)
def test_rows_of_the_ring_by_elements(name, off):
    """Wherever they begin, the tensor's first and last one too; nothing is read beyond it."""
    g = geometry(**ELEMENTS[name])
    assert not g.by_copies
    x = some_bits(g)
    line = g.width * (g.in_channels if g.problem.channels_last else 1)
    last = (g.batch - 1) * g.height * line * (1 if g.problem.channels_last else g.in_channels)
    kernel = rows(g, off)
    for begin in (0, line, last + (g.height - 1) * line):
        ring = np.full(g.ring_bytes // 4, 7, "uint32")
        element = np.array([begin], "int32")
        run(kernel, {"x": x.view(g.problem.dtype), "element": element, "y": ring})
        ring = ring.view(x.dtype).reshape(-1, g.pitch * g.per_word)
        where = [1, 1 + g.ring_rows] if g.mirrored > 1 else [1]
        for row in where:
            np.testing.assert_array_equal(ring[row], expected_row(g, x, begin), f"{begin}")
        assert not ring[[r for r in range(len(ring)) if r not in where]].any()


def copied(g, off):
    """The ring after the warps of a warpgroup have filled it once, from a row on."""
    BITS = "uint16" if g.problem.itemsize == 2 else "uint32"
    COUNT, WORDS = int(np.prod(g.problem.input_shape)), g.ring_bytes // 4
    ALIGNED = g.problem.itemsize if off else 16

    # fmt: off
    @T.prim_func
    def kernel(
        x_ptr: T.handle, first: T.Buffer((1,), "int32"), y: T.Buffer((WORDS,), "uint32")
    ):
        x = T.match_buffer(x_ptr, (COUNT,), g.problem.dtype, align=ALIGNED)
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([128])
        bits = T.decl_buffer((COUNT,), BITS, data=x.data)
        pool = T.SMEMPool()
        ring = cuda_thin_rows.Ring(pool, g, 1, 1)
        slots = Slots(pool, g)
        ring.place_barriers(pool)
        slots.place_barriers(pool)
        pool.commit()
        if t == 0:
            ring.init()
            slots.init()
        ring.clear(t, 128)
        slots.clear(t, 128)
        T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.cta_sync()
        copier = Copier(g, ring, slots, bits, t // 32, t % 32, first[0])
        copier.run_all(g.config.stages)
        T.cuda.cta_sync()
        for i in T.serial((WORDS + 127) // 128):
            if i * 128 + t < WORDS:
                y[i * 128 + t] = ring.data[i * 128 + t]
    # fmt: on

    return kernel


COPIES = {
    "whole words": dict(padding=0, stride=2, input_size=(12, 148)),
    "halves of words": dict(padding=0, stride=2, input_size=(12, 151)),
    "second copy": dict(padding=0, stride=1),
    "beside padding": dict(padding=1, stride=2),
    "beside padding, second copy": dict(padding=((1, 1), (3, 2)), input_size=(12, 149)),
    "short rows": dict(input_size=(12, 4), stride=2),
    "rows shorter than a chunk": dict(input_size=(12, 1), padding=1, in_channels=1),
    "pixels that are words": dict(in_channels=4, padding=1),
    "many words": dict(in_channels=12, input_size=(12, 100), stride=3),
    "cut": dict(input_size=(12, 151), stride=(2, 7)),
    "rows that no window reads": dict(input_size=(31, 40), stride=4),
    "filled up": dict(channels=4, padding=1),
    "filled up, one channel": dict(channels=2, in_channels=1, padding=((1, 1), (2, 3))),
    "four bytes": dict(dtype="float32", padding=((1, 1), (2, 3))),
}


@OFF
@pytest.mark.parametrize("name", COPIES)
def test_rows_of_the_ring_by_copies(name, off):
    """The tensor's first rows and its last ones, with padding; nothing is read beyond it."""
    g = geometry(**COPIES[name])
    assert g.by_copies
    x = some_bits(g)
    line = g.width * g.in_channels
    beside = g.left > 0 or g.left + g.input_columns < g.read_columns
    kernel = copied(g, off)
    for first in (0, g.batch * g.image_rows - g.ring_rows):
        ring = np.full(g.ring_bytes // 4, 7, "uint32")
        first_row = np.array([first], "int32")
        run(kernel, {"x": x.view(g.problem.dtype), "first": first_row, "y": ring})
        ring = ring.view(x.dtype).reshape(-1, g.pitch * g.per_word)
        for row in range(g.ring_rows):
            image, within = divmod(first + row, g.image_rows)
            if g.stride_h > g.next_row:
                window, within = divmod(within, g.window_rows)
                within += window * g.stride_h
            at = within - g.top
            if 0 <= at < g.height:
                expected = expected_row(g, x, (image * g.height + at) * line)
            else:
                expected = np.zeros(g.pitch * g.per_word, x.dtype)
            for found in [ring[row], *([ring[row + g.ring_rows]] if row < g.mirrored else [])]:
                # Where nothing is beside a row, what lies there is read by no window, or masked.
                used = (g.left + g.input_columns) * g.config.channels
                for copy in range(g.copies):
                    start = copy * (g.copy_words * 2 + 1)
                    end = start + (g.class_words * g.per_word - copy if beside else used)
                    np.testing.assert_array_equal(
                        found[start:end], expected[start:end], f"row {row} from {first}"
                    )


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
