"""The parts of `cuda_window`, each by itself: where pixels lie, the walk, the filter, the store."""

import itertools
import math

import hopper_kernels as kernels
import ml_dtypes
import numpy as np
import pytest
import tvm
from window_cases import BASE, CASES, EPILOGUES, FORMS, case_id, cases, drawn

from im2win_tvm import emulate
from im2win_tvm.schedules.cuda_window import folded
from im2win_tvm.schedules.cuda_window_filter import channel_of_row, packed_tiles, prepare
from im2win_tvm.schedules.cuda_window_tiles import Config, Geometry
from im2win_tvm.simulate import run

RNG = np.random.default_rng(3)
ALL = [*((problem, config) for _, problem, config, _ in cases()), *drawn(5, 90)]
FEW_OF_ALL = [*drawn(6, 12), *((p, c) for p, c in CASES.values() if c.dense)]


def of_class(taps, every, number):
    return len(range(number, taps, every))


def copies_of(g):
    """(channels, (class_h, class_w), (first_h, first_w), rows, columns) of each copy of a tile."""
    for channels, u, v in itertools.product(
        range(g.channel_rows), range(min(g.class_h, g.taps_h)), range(min(g.class_w, g.taps_w))
    ):
        rows, columns = of_class(g.taps_h, g.class_h, u), of_class(g.taps_w, g.class_w, v)
        served = rows if g.copy_h > 1 else 1, columns if g.copy_w > 1 else 1
        for first in itertools.product(range(0, rows, g.copy_h), range(0, columns, g.copy_w)):
            yield channels, (u, v), first, *served


def taps_of(g, copy):
    """Of a copy: (row and column among its taps, the tap of the window)."""
    _, (u, v), (first_h, first_w), rows, columns = copy
    for i, j in itertools.product(range(rows), range(columns)):
        yield (i, j), (u + (first_h + i) * g.class_h, v + (first_w + j) * g.class_w)


def outputs_of(g, warpgroup):
    """Of each pixel of a warpgroup its image, row and column in the block's tile."""
    c, along_p = g.config, warpgroup // g.config.along_m
    n, h, w = np.meshgrid(*map(np.arange, (c.tile_n, c.tile_h, c.tile_w)), indexing="ij")
    order = (1, 2, 0) if c.images else (0, 1, 2)
    n, h, w = (axis.transpose(order).reshape(-1) for axis in (n, h, w))
    if c.turns:
        return n, h, w
    return (n, h, w + along_p * c.tile_w) if c.columns_apart else (n, h + along_p * c.tile_h, w)


@pytest.mark.parametrize("case", ALL, ids=case_id)
def test_products_read_the_pixels_that_the_convolution_needs(case):
    """Of every copy, tap and warpgroup: what the copy engine brought to the rows that are read."""
    problem, config = folded(case[0]), case[1]
    g, c = Geometry(problem, config), config
    patch, steps = g.tensor_map.box[2:], g.tensor_map.steps[2:]
    # Axes of shared memory, outermost first; of what lies there, coordinates from the box's on.
    brought = np.stack(np.unravel_index(np.arange(math.prod(patch)), patch[::-1])[::-1])
    brought = brought * np.array(steps)[:, None]
    image, row, column = brought[[0, 2, 1]] if c.images else brought[[2, 1, 0]]
    assert g.patch_bytes == math.prod(patch) * 128
    pixel = np.arange(c.pixels)
    at = pixel // c.piece_n * g.piece_rows + (
        pixel % c.piece_n // 8 * g.group_rows + pixel % c.piece_n % 8
    )
    for copy in copies_of(g):
        _, (u, v), (first_h, first_w), _, _ = copy
        box_h = (u + first_h * g.class_h) * g.step_h
        box_w = (v + first_w * g.class_w) * g.step_w
        for (i, j), (tap_u, tap_v) in taps_of(g, copy):
            for warpgroup in range(1 if c.turns else c.consumers):
                n, h, w = outputs_of(g, warpgroup)
                first = 0 if c.turns else warpgroup // c.along_m * g.warpgroup_rows
                rows = first + at + i * g.tap_row + j * g.tap_column
                # An axis of one output, or of one tap, is not walked along.
                walked = (h < g.rows) & (w < g.columns)
                need_h = h * problem.stride[0] + tap_u * problem.dilation[0]
                need_w = w * problem.stride[1] + tap_v * problem.dilation[1]
                rows = rows[walked]
                np.testing.assert_array_equal(image[rows], n[walked])
                np.testing.assert_array_equal(box_h + row[rows], need_h[walked])
                np.testing.assert_array_equal(box_w + column[rows], need_w[walked])


@pytest.mark.parametrize("case", ALL, ids=case_id)
def test_sizes_agree_with_an_enumeration(case):
    problem, config = folded(case[0]), case[1]
    g = Geometry(problem, config)
    copies = list(copies_of(g))
    every = list(itertools.product(*map(range, problem.kernel_size)))
    assert sorted(g.order) == every
    assert len(copies) == g.copies
    taps = [tap for copy in copies for _, tap in taps_of(g, copy)]
    assert taps == g.order * g.channel_rows and len(taps) == g.filter_tiles
    assert all(rows <= g.copy_h and columns <= g.copy_w for *_, rows, columns in copies)
    outputs = problem.batch, *problem.output_size
    blocks = zip(outputs, (g.block_n, g.block_h, g.block_w), strict=True)
    whole = math.prod(-(-extent // block) for extent, block in blocks)
    assert g.tiles == whole * problem.groups * -(-g.per_group // config.block_m)
    assert g.channel_rows * g.row_channels >= g.channels > (g.channel_rows - 1) * g.row_channels


@pytest.mark.parametrize("case", FEW_OF_ALL, ids=case_id)
def test_the_walk_over_tiles_and_taps(case):
    """In a kernel, past the end of a tile's copies where channels are set back to the first."""
    problem, config = folded(case[0]), case[1]
    g = Geometry(problem, config)
    number = g.tiles * 2 // 3
    at, y = np.full((2, 6), -1, "int32"), np.full((g.copies, 13), -1, "int32")
    run(kernels.walk(g, number, g.copies), {"at": at, "y": y})
    filters = g.groups * g.m_tiles
    n, h, w = np.unravel_index(number // filters, (g.n_tiles, g.h_tiles, g.w_tiles))
    n, h, w = n * g.block_n, h * g.block_h, w * g.block_w
    group, m = divmod(number % filters, g.m_tiles)
    m *= config.block_m
    assert at[0].tolist() == [number % filters, group, m, n, h, w]
    beside = config.along_p - 1
    last = (h, w + beside * config.tile_w) if config.columns_apart else (
        h + beside * config.tile_h, w)  # fmt: skip
    assert at[1].tolist() == [number % filters, group, m + (config.along_m - 1) * 64, n, *last]
    passed = 0
    (top, _), (left, _) = problem.padding
    for found, copy in zip(y.tolist(), copies_of(g), strict=True):
        channels, (u, v), (first_h, first_w), rows, columns = copy
        passed += rows * columns
        _, (tap_u, tap_v) = next(taps_of(g, copy))
        first = h * g.stride_h + tap_u * g.step_h - top, w * g.stride_w + tap_v * g.step_w - left
        pixel = (n, first[1], first[0]) if config.images else (first[1], first[0], n)
        assert found == [
            channels, u, v, first_h, first_w, rows, columns,
            channels * g.row_channels, group, *pixel, passed,
        ]  # fmt: skip


def rounded(w):
    """To tf32: ten bits of the fraction, halves away from zero."""
    bits = w.view("uint32")
    special = (bits & 0x7F800000) == 0x7F800000
    return np.where(special, bits, (bits + 0x1000) & 0xFFFFE000).view("float32")


def packed_by_numpy(g, w):
    p, c = g.problem, g.config
    if p.dtype == "float32":
        w = rounded(w)
    padded = np.zeros((p.groups, g.m_tiles * c.block_m, g.channel_rows * g.row_channels,
                       *p.kernel_size), w.dtype)  # fmt: skip
    padded[:, : g.per_group, : w.shape[1]] = w.reshape(p.groups, g.per_group, *w.shape[1:])
    out = np.empty(packed_tiles(g), w.dtype)
    for tile, (group, m, k, (u, v)) in enumerate(
        itertools.product(range(p.groups), range(g.m_tiles), range(g.channel_rows), g.order)
    ):
        for row in range(c.block_m):
            held = padded[group, m * c.block_m + int(channel_of_row(g, row)), :, u, v]
            held = held[k * g.row_channels :][: g.row_channels].reshape(8, -1)
            out[tile, row] = held[np.arange(8) ^ row % 8]
    return out


@pytest.mark.parametrize(
    "case",
    [
        (p.replace(dtype=d), c)
        for (p, c), d in zip(FEW_OF_ALL, itertools.cycle(FORMS), strict=False)
    ],
    ids=case_id,
)
def test_packed_filter(case):
    problem, config = folded(case[0]), case[1]
    g = Geometry(problem, config)
    w = RNG.standard_normal(problem.weight_shape).astype("float32")
    w[0, 0, 0, 0], w[-1, 0, -1, 0], w[-1, -1, -1, -1] = np.nan, np.inf, 2.0**-10 + 2.0**-21
    w = w.astype(ml_dtypes.bfloat16 if problem.dtype == "bfloat16" else problem.dtype)
    function = emulate.serial(prepare(problem, config, problem))
    function = function.with_attr("global_symbol", "prepare")
    module = tvm.IRModule({"prepare": function})
    given = tvm.runtime.tensor(w)
    out = tvm.runtime.tensor(np.ones(packed_tiles(g), problem.dtype))
    tvm.compile(module, target="llvm").jit()["prepare"](given, out)
    np.testing.assert_array_equal(
        out.numpy().astype("float32"), packed_by_numpy(g, w).astype("float32")
    )


def test_rows_of_the_filter_are_its_channels_once():
    for fields in ({}, dict(layout="NCHW"), dict(out_channels=76), dict(dtype="float32")):
        g = Geometry(BASE.replace(**fields), Config(1, 2, 8, along_m=2))
        assert sorted(int(channel_of_row(g, row)) for row in range(128)) == list(range(128))


STORES = {
    "staged": ({}, Config(1, 3, 8)),
    "staged, 36 pixels": (dict(input_size=(5, 9)), Config(3, 3, 8, along_p=2)),
    "staged images": (dict(batch=9, dtype="bfloat16"), Config(8, 2, 3, True, along_m=2)),
    "staged groups": (dict(in_channels=80, out_channels=80, groups=2), Config(1, 1, 16, along_p=2)),
    "float32": (dict(dtype="float32"), Config(1, 3, 8, along_m=2)),
    "single channels": (dict(out_channels=37), Config(2, 2, 8)),
    "NCHW, runs of 8": (dict(layout="NCHW", input_size=(5, 16)), Config(1, 3, 8, along_p=2)),
    "NCHW, runs of 4": (
        dict(layout="NCHW", input_size=(2, 12), out_channels=37, dtype="bfloat16"),
        Config(1, 1, 16),
    ),
    "NCHW, runs of 2": (dict(layout="NCHW"), Config(2, 3, 8, along_m=2)),
    "NCHW, runs of 1": (dict(layout="NCHW", input_size=(5, 9)), Config(1, 1, 40)),
    "NCHW, pairs of pixels": (dict(layout="NCHW", dtype="float32"), Config(1, 3, 8, along_p=2)),
    "NCHW, single pixels": (
        dict(layout="NCHW", dtype="float32", input_size=(5, 9)),
        Config(1, 1, 16),
    ),
    "NCHW images": (dict(layout="NCHW", batch=9, dtype="bfloat16"), Config(8, 2, 2, True)),
}


@pytest.mark.parametrize(
    ("name", "epilogue"),
    [
        *((name, EPILOGUES[-1]) for name in STORES),
        *(("staged", epilogue) for epilogue in EPILOGUES[:-1]),
        *(("NCHW, runs of 2", epilogue) for epilogue in EPILOGUES[1:-1:2]),
    ],
    ids=str,
)
def test_store(name, epilogue):
    """From sums in registers to y: all of it once, in two parts, nothing from beyond."""
    fields, config = STORES[name]
    problem = BASE.replace(**fields)
    g, c = Geometry(problem, config), config
    n, h, w = problem.batch, *problem.output_size
    sums = RNG.integers(-9, 10, (n, h, w, problem.out_channels)).astype("float32")
    products = np.full((g.tiles, c.consumers, 64, c.pixels), 1e4, "float32")
    for tile, warpgroup in itertools.product(range(g.tiles), range(c.consumers)):
        rest, filters = divmod(tile, g.groups * g.m_tiles)
        group, m = divmod(filters, g.m_tiles)
        place = np.unravel_index(rest, (g.n_tiles, g.h_tiles, g.w_tiles))
        outputs = outputs_of(g, warpgroup)
        n_at, h_at, w_at = (
            t * block + o
            for t, block, o in zip(place, (g.block_n, g.block_h, g.block_w), outputs, strict=True)
        )
        inside = (n_at < n) & (h_at < h) & (w_at < w)
        for row in range(64):
            channel = m * c.block_m + warpgroup % c.along_m * 64 + int(channel_of_row(g, row))
            if channel < g.per_group:
                products[tile, warpgroup, row, inside] = sums[
                    n_at[inside], h_at[inside], w_at[inside], group * g.per_group + channel
                ]
    dtype = ml_dtypes.bfloat16 if problem.dtype == "bfloat16" else problem.dtype
    bias = RNG.integers(-9, 10, problem.out_channels).astype(dtype)
    residual = RNG.integers(-9, 10, problem.output_shape).astype(dtype)
    expected = sums if problem.channels_last else np.moveaxis(sums, -1, 1)
    if epilogue.bias:
        shaped = bias if problem.channels_last else bias[:, None, None]
        expected = expected + shaped.astype("float32")
    if epilogue.residual:
        expected = expected + residual.astype("float32")
    if epilogue.activation:
        expected = expected.clip(0)
    for cut in {0, c.pixels // 16 * (epilogue == EPILOGUES[-1])}:
        y = np.full(expected.size, np.nan, dtype)
        arrays = dict(products=products, bias=bias, residual=residual.reshape(-1), y=y)
        run(kernels.store(g, epilogue, cut), arrays)
        np.testing.assert_array_equal(y.astype("float32"), expected.reshape(-1))
