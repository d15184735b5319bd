"""Tensors in cuDNN's two memory formats, made once for all that takes turns on one problem."""

from __future__ import annotations

import weakref
from typing import Any

from ..operands import Operands

__all__ = ["Tensors", "tensors_for"]


class Tensors:
    """What algorithms and engines share on one problem: a copy each would not fit on the device.

    They take turns on one stream, so one output a format and one workspace, the largest asked
    for, are enough.
    """

    def __init__(self, operands: Operands) -> None:
        import torch

        self._torch = torch
        problem = operands.problem
        x = operands.x.movedim(-1, 1) if problem.channels_last else operands.x
        self._sources = x, operands.w
        self._shape = (problem.batch, problem.out_channels, *problem.output_size)
        self._inputs: dict[str, tuple[Any, Any]] = {}
        self._outputs: dict[str, Any] = {}
        self.workspace = torch.empty(0, dtype=torch.uint8, device=x.device)

    def _format(self, layout: str) -> Any:
        torch = self._torch
        return torch.channels_last if layout == "NHWC" else torch.contiguous_format

    def inputs(self, layout: str) -> tuple[Any, Any]:
        """x ``[N, Ci, H, W]`` and w ``[Co, Ci / groups, Hf, Wf]``, in memory as the layout says."""
        if layout not in self._inputs:
            order = self._format(layout)
            self._inputs[layout] = tuple(t.contiguous(memory_format=order) for t in self._sources)
        return self._inputs[layout]

    def output(self, layout: str) -> Any:
        """The shared output ``[N, Co, Ho, Wo]``, poisoned with NaN again."""
        torch = self._torch
        if layout not in self._outputs:
            x, _ = self._sources
            empty = torch.empty(self._shape, dtype=x.dtype, device=x.device)
            self._outputs[layout] = empty.contiguous(memory_format=self._format(layout))
        return self._outputs[layout].fill_(torch.nan)

    def reserve(self, size: int) -> None:
        """Have a workspace of at least `size` bytes; if there is no room, the one before stays."""
        if self.workspace.numel() < size:
            device = self.workspace.device
            self.workspace = self._torch.empty(size, dtype=self._torch.uint8, device=device)


_shared: weakref.WeakKeyDictionary[Operands, Tensors] = weakref.WeakKeyDictionary()


def tensors_for(operands: Operands) -> Tensors:
    """The tensors of these operands; they go when the operands go."""
    if operands not in _shared:
        _shared[operands] = Tensors(operands)
    return _shared[operands]
