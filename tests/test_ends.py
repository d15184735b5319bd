"""The ends of a network by functions of their own."""

import numpy as np
import pytest
import tvm

from im2win_tvm import simulate
from im2win_tvm.emulate import serial
from im2win_tvm.relax.ends import channels_last, mean


def computed(function, x, shape, dtype):
    library = tvm.compile(tvm.IRModule({"main": serial(function)}), target="llvm")
    y = tvm.runtime.tensor(np.full(shape, np.nan, dtype))
    library["main"](tvm.runtime.tensor(x), y)
    return y.numpy()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_channels_last(dtype):
    x = np.random.default_rng(1).standard_normal((2, 3, 9, 17)).astype(dtype)
    y = computed(channels_last(x.shape, dtype), x, (2, 9, 17, 3), dtype)
    np.testing.assert_array_equal(y, x.transpose(0, 2, 3, 1))


@pytest.mark.parametrize(("dtype", "lanes"), [("float16", 2), ("float32", 1)])
def test_mean(dtype, lanes):
    x = np.random.default_rng(1).standard_normal((3, 7, 5, 200)).astype(dtype)
    y = np.full((3, 1, 1, 200), np.nan, "float32")
    simulate.run(mean(x.shape, dtype, lanes), {"x": x, "share": np.float32([1 / 35]), "y": y})
    np.testing.assert_allclose(y, x.astype("float64").mean((1, 2), keepdims=True), atol=1e-6)
