"""im2col and a matrix product, by PyTorch with cuDNN switched off: what the paper calls cuBLAS.

Without cuDNN, conv2d on CUDA goes to PyTorch's own backends ``Slow2d`` and ``SlowDilated2d``, which
loop over the images: im2col of one, then one product by cuBLAS. The kernels are short, so small
layers may take as long as their launches. Depthwise problems have a direct kernel in PyTorch
instead, and groups go through it group by group; for these, and wherever PyTorch chooses anything
else, it is im2col of the whole batch (`unfold`) and one batched product. Which of the two ran is in
the record.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from ...accuracy import OWN
from ...problem import ConvProblem
from ...target import Target
from ..ceilings import float32_sums
from ..operands import Operands
from .base import COMPETITOR_LIMIT, Prepared
from .torch_conv import peak_above

# PyTorch's names of the backends that do im2col and a product.
IM2COL_BACKENDS = ("Slow2d", "SlowDilated2d")


class Cublas:
    """`torch.nn.functional.conv2d` without cuDNN, or `unfold` and `matmul`, in NCHW."""

    name = "cublas"
    family = "cublas"
    relative_limit = COMPETITOR_LIMIT

    def accuracy(self, problem: ConvProblem) -> str:
        return OWN[problem.dtype]

    def available(self, problem: ConvProblem, target: Target) -> str | None:
        if target.kind != "cuda":
            return f"target={target.kind}: cuBLAS is for cuda"
        if importlib.util.find_spec("torch") is None:
            return "PyTorch is not installed (pip install 'im2win_tvm[torch]')"
        if problem.spatial_rank != 2:
            return f"input_size={problem.input_size}: conv2d takes two spatial axes"
        if any(before != after for before, after in problem.padding):
            return f"padding={problem.padding}: unfold takes the same before and after"
        return None

    def prepare(self, operands: Operands, target: Target) -> Prepared:

        problem = operands.problem
        float32_sums()
        x = operands.x.movedim(-1, 1) if problem.channels_last else operands.x
        x, w = x.contiguous(), operands.w
        call, how = choose(problem, x, w)

        def view(y: Any) -> Any:
            return y.movedim(1, -1) if problem.channels_last else y

        return Prepared(
            call, peak_above(call), {"how": how, "tf32": False, "sums": "float32"}, view
        )


def choose(problem: ConvProblem, x: Any, w: Any) -> tuple[Callable[[], Any], str]:
    """The call that is im2col and a product, and which one it is."""
    import torch

    plain = problem.groups == 1 and torch.cuda.is_available() and x.is_cuda
    backend = _backend(problem, x, w) if plain else "not asked"
    if backend in IM2COL_BACKENDS:
        return conv2d_without_cudnn(problem, x, w), f"conv2d without cuDNN: {backend}"
    return unfold_and_matmul(problem, x, w), "unfold and matmul over the whole batch"


def _backend(problem: ConvProblem, x: Any, w: Any) -> str:
    """The name of the backend that conv2d would take without cuDNN."""
    import torch

    pads = [before for before, _ in problem.padding]
    with torch.backends.cudnn.flags(enabled=False):
        chosen = torch._C._select_conv_backend(
            x, w, None, problem.stride, pads, problem.dilation, False, [0, 0], problem.groups, None
        )
    return chosen.name


def conv2d_without_cudnn(problem: ConvProblem, x: Any, w: Any) -> Callable[[], Any]:
    """A call of conv2d with cuDNN switched off for it alone."""
    import torch
    from torch.nn import functional

    pads = tuple(before for before, _ in problem.padding)

    @torch.no_grad()
    def call() -> Any:
        with torch.backends.cudnn.flags(enabled=False):
            return functional.conv2d(
                x, w, None, problem.stride, pads, problem.dilation, problem.groups
            )

    return call


def unfold_and_matmul(problem: ConvProblem, x: Any, w: Any) -> Callable[[], Any]:
    """A call of unfold, ``[N, Ci * Hf * Wf, Ho * Wo]``, and one product a group and image."""
    import torch
    from torch.nn import functional

    pads = tuple(before for before, _ in problem.padding)
    filters = w.reshape(problem.groups, problem.out_channels // problem.groups, problem.k)
    shape = (problem.batch, problem.out_channels, *problem.output_size)

    @torch.no_grad()
    def call() -> Any:
        columns = functional.unfold(x, problem.kernel_size, problem.dilation, pads, problem.stride)
        columns = columns.reshape(problem.batch, problem.groups, problem.k, -1)
        return torch.matmul(filters, columns).reshape(shape)

    return call
