"""Compile a convolution, call it, and compare with PyTorch if that is installed."""

import numpy as np

import im2win_tvm

problem = im2win_tvm.ConvProblem(1, 64, (56, 56), 64, (3, 3), padding=1)
kernel = im2win_tvm.compile(problem, "llvm", bias=True, activation="relu")
print(kernel)

rng = np.random.default_rng(0)
x = rng.standard_normal(problem.input_shape, np.float32)
w = rng.standard_normal(problem.weight_shape, np.float32)
bias = rng.standard_normal(problem.out_channels, np.float32)

prepared = kernel.prepare(w)  # once: filters in the order in which the kernel reads them
y = kernel(x, prepared, bias)
print("output", y.shape, "workspace", kernel.workspace_bytes, "bytes")

try:
    import torch
except ImportError:
    print("PyTorch is not installed: nothing to compare with")
else:
    given = map(torch.from_numpy, (x, w, bias))
    expected = torch.nn.functional.conv2d(*given, padding=1).relu().numpy()
    error = np.abs(y - expected).max()
    print(f"largest difference from PyTorch: {error:.1e}")
    assert error < 1e-3
