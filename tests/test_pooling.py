"""Maximum pooling by the functions that stand in for TVM's on a GPU."""

import numpy as np
import pytest
import tvm

from im2win_tvm.emulate import serial
from im2win_tvm.relax.pooling import maximum

torch = pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.mark.parametrize(
    ("shape", "dtype", "size", "stride", "padding", "ceil"),
    [
        ((2, 11, 13, 64), "float16", 3, 2, 1, False),
        ((2, 8, 9, 6), "float32", 2, 2, 0, False),
        ((1, 9, 7, 5), "float32", 2, 2, 0, True),
        ((1, 7, 7, 8), "float16", 3, 1, 1, False),
    ],
)
def test_agrees_with_pytorch(shape, dtype, size, stride, padding, ceil):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    image = torch.tensor(x).permute(0, 3, 1, 2).float()
    expected = torch.nn.functional.max_pool2d(image, size, stride, padding, ceil_mode=ceil)
    expected = expected.permute(0, 2, 3, 1).numpy()
    function = maximum(shape, expected.shape, dtype, [size] * 2, [stride] * 2, [padding] * 4)
    library = tvm.compile(tvm.IRModule({"main": serial(function)}), target="llvm")
    y = tvm.runtime.tensor(np.full(expected.shape, np.nan, dtype))
    library["main"](tvm.runtime.tensor(x), y)
    np.testing.assert_array_equal(y.numpy(), expected)
