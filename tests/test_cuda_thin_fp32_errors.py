"""The arithmetic of `cuda_thin_fp32` by itself, on tensor cores that truncate as an H100's do."""

import numpy as np
import pytest
from fp32_errors import as_the_thin_kernel, fma_chain, rms, thin_halves
from test_cuda_window_fp32_errors import KINDS, rows

# Products of an output: of 3x3 with 1, 2 and 3 channels, of 4x4x3, 5x5x3; from 96 on two halves; of
# 7x7x3, 11x11x3, 16x16x3.
SHORT, LONG = (9, 18, 27, 48, 75, 95), (96, 128, 147, 320, 363, 768)


def errors(kind, k, steps):
    """rms relative error of the kernel's arithmetic, and of a chain of fma, over three seeds."""
    found = []
    for seed in range(3):
        a, b = rows(kind, k, seed)
        exact = a.astype(np.float64) @ b.astype(np.float64).T
        found.append([rms(as_the_thin_kernel(a, b, steps) - exact, exact),
                      rms(fma_chain(a, b) - exact, exact)])  # fmt: skip
    return np.sqrt(np.square(found).mean(axis=0))


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "channels 20"])
@pytest.mark.parametrize("k", [*SHORT, *LONG])
def test_no_larger_than_those_of_a_chain_of_fma(k, kind, steps):
    ours, chain = errors(kind, k, steps)
    assert 0 < ours <= chain


def test_where_they_are_larger():
    """What docs/accuracy.md admits: sparse inputs, a range that the filter undoes."""
    for k in LONG[:3]:
        ours, chain = errors("sparse", k, 1)
        assert chain < ours < 3.5 * chain and ours < 2e-7
    for k in SHORT:
        # Of sums of one product or two both are but rounded.
        ours, chain = errors("sparse", k, 1)
        assert ours < 1.02 * chain
    for k in (27, 147):
        ours, chain = errors("channels 20", k, 1)
        assert chain < 1e-6 and 0.1 < ours < 1


def test_three_halves_keep_all_bits():
    r = np.random.default_rng(1)
    x = (r.standard_normal((500, 32)) * np.exp2(r.integers(-30, 1, (500, 32)))).astype(np.float32)
    halves, scale = thin_halves(x, 3, 1)
    error = np.abs(x - scale * sum(halves))
    largest = np.abs(x).max(axis=1, keepdims=True)
    assert (error <= np.where(np.abs(x) < 2.0**-15 * largest, 2.0**-39 * largest, 0)).all()
    assert error.any()
