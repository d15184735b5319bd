"""Convolutions of PyTorch by kernels of im2win_tvm.

import im2win_tvm.torch
y = im2win_tvm.torch.conv2d(x, weight, bias, stride=2, padding=1)   # torch.ops.im2win.conv2d
layer = im2win_tvm.torch.Conv2d(3, 64, 7, stride=2, padding=3)      # instead of nn.Conv2d
print(im2win_tvm.torch.convert(model, x))                           # a model's, where faster
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("PyTorch is missing: pip install 'im2win_tvm[torch]'") from error

from .conversion import Converted, Report, convert
from .module import Conv2d
from .operator import FallbackWarning, conv2d

__all__ = ["Conv2d", "Converted", "FallbackWarning", "Report", "conv2d", "convert"]
