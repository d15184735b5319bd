"""A PyTorch model through TVM's Relax with kernels of im2win_tvm, against PyTorch's outputs.

Needs PyTorch: pip install 'im2win_tvm[torch]'.
"""

import numpy as np
import torch
import tvm
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from im2win_tvm.relax import UseIm2win, build

model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
    torch.nn.BatchNorm2d(32),
    torch.nn.ReLU(),
    torch.nn.Conv2d(32, 32, 3, padding=1),
    torch.nn.ReLU(),
    torch.nn.MaxPool2d(2),
    torch.nn.Flatten(),
    torch.nn.Linear(32 * 16 * 16, 10),
).eval()
x = torch.randn(1, 3, 64, 64)

module = from_exported_program(torch.export.export(model, (x,)))
rewrite = UseIm2win("llvm")
module = rewrite(module)
print(rewrite.report)

machine = relax.VirtualMachine(build(module, "llvm"), tvm.cpu())
[y] = machine["main"](tvm.runtime.tensor(x.numpy()))
with torch.no_grad():
    error = np.abs(y.numpy() - model(x).numpy()).max()
print(f"largest difference from PyTorch: {error:.1e}")
assert error < 1e-4
