"""Patches beside another image, simulated."""

import numpy as np
import pytest

from im2win_tvm import simulate
from im2win_tvm.relax.joining import join


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values(dtype):
    rng = np.random.default_rng(4)
    batch, rows, columns, height, width, filters, channels = 2, 3, 5, 2, 3, 16, 8
    patches = rng.standard_normal((batch, rows, columns, height, width, filters)).astype(dtype)
    other = rng.standard_normal((batch, rows * height, columns * width, channels)).astype(dtype)
    bias = rng.standard_normal(filters).astype(dtype)
    y = np.full((*other.shape[:3], channels + filters), np.nan, dtype)
    arrays = {"other": other, "patches": patches, "bias": bias, "y": y}
    simulate.run(join(y.shape, patches.shape, dtype), arrays)
    image = patches.transpose(0, 1, 3, 2, 4, 5).reshape(*other.shape[:3], filters)
    np.testing.assert_array_equal(y, np.concatenate([other, image + bias], 3))
