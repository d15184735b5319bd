"""PyTorch's conv2d: oneDNN on the CPU, cuDNN on CUDA, in both of its memory formats.

On CUDA `cudnn.benchmark` chooses among every engine that cuDNN proposes, without TF32, and in
entries of class tf32 with it.

Tensors are brought into the memory format outside the timing: the better format is what a model
kept in it gets. Uneven padding, which conv2d has no argument for, is a copy inside the timing.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from ...accuracy import OWN, TF32
from ...problem import ConvProblem
from ...target import CpuTarget, Target
from ..accuracy import no_tf32
from ..operands import Operands
from .base import COMPETITOR_LIMIT, TF32_COMPETITOR_LIMIT, Prepared


class Torch:
    """`torch.nn.functional.conv2d` in one memory format.

    tf32: whether cuDNN may compute float32 in TF32.
    """

    family = "torch"

    def __init__(self, channels_last: bool, tf32: bool = False) -> None:
        self.channels_last = channels_last
        self.tf32 = tf32
        self.relative_limit = TF32_COMPETITOR_LIMIT if tf32 else COMPETITOR_LIMIT
        self.name = ("torch nhwc" if channels_last else "torch nchw") + (" tf32" if tf32 else "")

    def accuracy(self, problem: ConvProblem) -> str:
        return TF32 if self.tf32 else OWN[problem.dtype]

    def available(self, problem: ConvProblem, target: Target) -> str | None:
        if importlib.util.find_spec("torch") is None:
            return "PyTorch is not installed (pip install 'im2win_tvm[torch]')"
        if problem.spatial_rank != 2:
            return f"input_size={problem.input_size}: conv2d takes two spatial axes"
        return no_tf32(target) if self.tf32 else None

    def prepare(self, operands: Operands, target: Target) -> Prepared:
        import torch

        problem = operands.problem
        on_cpu = isinstance(target, CpuTarget)
        detail: dict[str, Any] = {
            "memory_format": "channels_last" if self.channels_last else "contiguous"
        }
        if on_cpu:
            torch.set_num_threads(target.threads)
            detail["threads"] = target.threads
        else:
            torch.backends.cudnn.benchmark = True
            # 0 is all; by default the search ends after the first ten engines.
            torch.backends.cudnn.benchmark_limit = 0
            torch.backends.cuda.matmul.allow_tf32 = False
            detail |= {"cudnn_benchmark": True, "cudnn_benchmark_limit": 0, "tf32": self.tf32}
        x, w = torch.as_tensor(operands.x), torch.as_tensor(operands.w)
        if problem.channels_last:
            x = x.movedim(-1, 1)
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        x, w = (t.contiguous(memory_format=memory_format) for t in (x, w))
        call = _call(problem, x, w, None if on_cpu else self.tf32)

        def view(y: Any) -> Any:
            y = y.movedim(1, -1) if problem.channels_last else y
            return y.numpy() if on_cpu else y

        workspace = None if on_cpu else peak_above(call)
        return Prepared(call, workspace, detail, view)


def _call(problem: ConvProblem, x: Any, w: Any, tf32: bool | None) -> Any:
    """The call; tf32: what cuDNN is told in each, None where there is no cuDNN."""
    import torch
    from torch.nn import functional

    uneven = any(before != after for before, after in problem.padding)
    pads = [entry for pair in reversed(problem.padding) for entry in pair]
    even = 0 if uneven else tuple(before for before, _ in problem.padding)

    @torch.no_grad()
    def call() -> Any:
        if tf32 is not None:
            # One flag for all of PyTorch, and entries with and without TF32 take turns.
            torch.backends.cudnn.allow_tf32 = tf32
        source = functional.pad(x, pads) if uneven else x
        return functional.conv2d(
            source, w, None, problem.stride, even, problem.dilation, problem.groups
        )

    return call


def peak_above(call: Any) -> int:
    """Peak of PyTorch's CUDA memory during a call, in bytes above what is there after it."""
    import torch

    call()  # cuDNN's search for an algorithm takes memory of its own
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    output = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del output  # held until here: it is no workspace
    return peak
