"""The convolution in PyTorch's float64: a second reference, which others wrote."""

import numpy as np


def conv2d(problem, x, w, bias=None, residual=None, relu=False):
    """Float64 in the problem's layout, from NumPy arrays of any real dtype; needs PyTorch."""
    import torch

    def double(array):
        return torch.from_numpy(np.asarray(array, np.float64))

    source = double(x).permute(0, 3, 1, 2) if problem.channels_last else double(x)
    (top, bottom), (left, right) = problem.padding
    y = torch.nn.functional.conv2d(
        torch.nn.functional.pad(source, (left, right, top, bottom)),
        double(w),
        None if bias is None else double(bias),
        stride=problem.stride,
        dilation=problem.dilation,
        groups=problem.groups,
    )
    if problem.channels_last:
        y = y.permute(0, 2, 3, 1)
    if residual is not None:
        y = y + double(residual)
    return (torch.relu(y) if relu else y).contiguous().numpy()
