"""Layer normalisation by the functions that stand in for TVM's on a GPU, simulated."""

import numpy as np
import pytest

from im2win_tvm import simulate
from im2win_tvm.relax.normalisation import lanes, normalise


def expected(x, gamma, beta, epsilon):
    wide = x.astype("float64")
    centred = wide - wide.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * gamma + beta


@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [
        ((2, 7, 5, 96), "float16", 4e-3),
        ((3, 2, 1, 24), "float32", 2e-6),
        ((1, 5, 768), "float16", 4e-3),
    ],
)
def test_agrees_with_float64(shape, dtype, tolerance):
    rng = np.random.default_rng(3)
    x = (3 * rng.standard_normal(shape) + 1).astype(dtype)
    gamma, beta = (rng.standard_normal(shape[-1]).astype(dtype) for _ in range(2))
    y = np.full(shape, np.nan, dtype)
    arrays = {"x": x, "gamma": gamma, "beta": beta, "y": y}
    simulate.run(normalise(shape, dtype, 1e-5), arrays)
    np.testing.assert_allclose(y, expected(x, gamma, beta, 1e-5), rtol=tolerance, atol=tolerance)


def test_rows_that_warps_do_not_divide():
    assert [lanes(n, "float16") for n in (96, 192, 384, 768, 20)] == [4, 8, 16, 32, None]
    assert lanes(8 * 11, "float16") is None  # a prime number of loads, more than a thread holds
