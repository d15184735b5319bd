"""What tests of PyTorch's operator and modules share: operands, and a process without kernels."""

import numpy as np
import torch

from im2win_tvm import kernel_cache
from im2win_tvm.kernel_cache import KernelCache
from im2win_tvm.torch import operator

# x, w, bias, stride, padding, dilation, groups
CASES = {
    "plain": ((2, 3, 9, 11), (5, 3, 3, 2), False, (1, 1), (0, 0), (1, 1), 1),
    "all": ((2, 8, 13, 11), (6, 4, 3, 3), True, (2, 1), (1, 2), (1, 2), 2),
    "depthwise": ((1, 7, 8, 9), (7, 1, 5, 5), True, (1, 1), (2, 2), (1, 1), 7),
}


def forget(tmp_path, monkeypatch):
    """A cache of this test's own, and a process that has called nothing yet."""
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(operator, "CACHE", KernelCache())
    monkeypatch.setattr(operator, "_kernels", {})


def operands(case, dtype=torch.float32, memory_format=torch.contiguous_format):
    """Whole numbers, and so small that sums are exact."""
    shape, weight_shape, bias, *rest = case
    torch.manual_seed(7)
    x, w, b = (
        torch.randint(-3, 4, size).to(dtype) for size in (shape, weight_shape, weight_shape[:1])
    )
    return x.to(memory_format=memory_format), w, b if bias else None, *rest


def assert_same(actual, expected):
    np.testing.assert_array_equal(actual.detach().numpy(), expected.detach().numpy())
