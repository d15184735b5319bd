"""What kernels for Hopper are made of, each by itself: simulated, or plain arithmetic."""

import itertools

import hopper_kernels as kernels
import numpy as np
import pytest
from simulated_arrays import nan, normal

from im2win_tvm.schedules.hopper import TensorMap, registers
from im2win_tvm.simulate import SimulationError, run

RNG = np.random.default_rng(2)


def whole(*shape, dtype="float32"):
    """Numbers of few bits: every product and sum of them is exact."""
    return RNG.integers(-4, 5, shape).astype(dtype)


def swizzled(array):
    """Rows of 128 bytes, the 16-byte chunks of each exchanged by its number among eight."""
    rows = array.reshape(array.shape[0], 8, -1)
    order = np.arange(8) ^ np.arange(len(rows))[:, None] % 8
    return np.take_along_axis(rows, order[..., None], axis=1).reshape(array.shape)


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8])
def test_positions(stages):
    for count in (0, 1, 2, 7, 9, 36):
        y = np.full((9, 4), -1, "int32")
        run(kernels.positions(stages, count, len(y)), {"y": y})
        for i, found in enumerate(y.tolist()):
            skipped = (i + 1) * count + i
            after = skipped + 1
            assert found == [
                skipped % stages, skipped // stages % 2, after % stages, after // stages % 2,
            ], (count, i)  # fmt: skip


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_bytes_go_round_a_ring(stages):
    for tiles, consumers in ((1, 2), (stages, 1), (2 * stages + 1, 2), (3 * stages + 1, 1)):
        x, y = normal(tiles, kernels.FLOATS), nan(consumers, tiles, kernels.FLOATS)
        run(kernels.ring(stages, tiles, consumers), {"x": x, "y": y})
        np.testing.assert_array_equal(y, np.stack([x] * consumers))


def test_turns():
    order = np.full(10, -1, "int32")
    run(kernels.by_turns(5), {"order": order})
    assert order.tolist() == [0, 1] * 5
    with pytest.raises(SimulationError, match="no barrier between"):
        run(kernels.by_turns(5, waits=False), {"order": order})


def test_stages_that_are_given_back_too_early():
    arrays = {"x": normal(3, kernels.FLOATS), "y": nan(1, 3, kernels.FLOATS)}
    with pytest.raises(SimulationError, match=r"copy into a word that block 0 thread .* read"):
        run(kernels.ring(2, 3, early=True), arrays)


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("stages", [2, 3])
def test_boxes_go_round_a_ring(stages, step):
    """The first and the last reach beyond the tensor."""
    tiles = 3 * stages + 1
    extent = tiles * 8 * step - 7
    x, y = whole(extent, 64, dtype="float16"), nan(tiles, 8, 64, dtype="float16")
    run(kernels.boxes(stages, tiles, extent, step), {"x": x, "y": y})
    rows = np.arange(tiles * 8) * step - 2
    inside = (rows >= 0) & (rows < extent)
    expected = np.where(inside[:, None], x[rows.clip(0, extent - 1)], 0).reshape(y.shape)
    np.testing.assert_array_equal(y, np.stack([swizzled(tile) for tile in expected]))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("n", "first", "apart", "stage"),
    [(8, 0, 8, 0), (8, 5, 8, 1), (16, 3, 10, 1), (24, 13, 9, 0), (32, 1, 16, 1), (64, 7, 18, 0)],
)
def test_products_of_rows_at_any_distance(n, first, apart, stage, dtype):
    width = 128 // np.dtype(dtype).itemsize
    rows = -(-(first + n // 8 * apart) // 8) * 8
    a, b = whole(64, width, dtype=dtype), whole(rows, width, dtype=dtype)
    y = nan(64, n)
    arrays = {"a": swizzled(a), "b": swizzled(b), "y": y}
    run(kernels.rows_by_wgmma(dtype, n, first, apart, stage), arrays)
    read = [first + i // 8 * apart + i % 8 for i in range(n)]
    np.testing.assert_array_equal(y, a.astype("float32") @ b.astype("float32")[read].T)


@pytest.mark.parametrize("blocks", [2, 3, 4, 8])
def test_sums_of_a_cluster(blocks):
    """Also where shares differ, or some blocks have none."""
    for fours in (1, 3, 7):
        x, y = whole(2, blocks, 128, fours * 4), nan(2, 128, fours * 4)
        run(kernels.cluster_sum(blocks, fours), {"x": x, "y": y})
        np.testing.assert_array_equal(y, x.sum(1))


GOOD = TensorMap((64, 40, 30), (128, 5120), (64, 8, 5), (1, 2, 8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, None),
        (dict(box=(64, 128, 32)), None),
        (
            dict(box=(64, 8, 33)),
            "a box over (64, 15, 257) elements: allowed are up to 256 of an axis",
        ),
        (
            dict(box=(64, 129, 5)),
            "a box over (64, 257, 33) elements: allowed are up to 256 of an axis",
        ),
        (dict(steps=(1, 2, 9)), "steps of (1, 2, 9): allowed are 1 to 8"),
        (dict(steps=(1, 0, 8)), "steps of (1, 0, 8): allowed are 1 to 8"),
        (
            dict(strides=(136, 5120)),
            "strides of (136, 5120) bytes: allowed are multiples of 16 below 2**40",
        ),
        (
            dict(strides=(128, 1 << 40)),
            "strides of (128, 1099511627776) bytes: allowed are multiples of 16 below 2**40",
        ),
    ],
)
def test_limits_of_tensor_maps(fields, message):
    assert GOOD.spans == (64, 15, 33)
    assert GOOD._replace(**fields).reason() == message


def test_registers_of_a_block_are_never_more_than_it_was_launched_with():
    for consumers, blocks in itertools.product((1, 2, 3, 4), (1, 2, 3)):
        given = registers(consumers, blocks)
        assert all(count % 8 == 0 and 24 <= count <= 255 for count in given)
        assert given.producer + consumers * given.consumer <= given.launched * (consumers + 1)
        assert blocks * given.launched * (consumers + 1) * 128 <= 65536
        # Each side of setmaxnreg has its direction.
        assert given.producer <= given.launched <= given.consumer or given.launched > 240
