"""cuDNN's own forward algorithms by name, each in both memory formats.

PyTorch takes one of these, or of cuDNN's newer engines, and tells neither which nor its workspace;
its better format is the family `torch`. float32 runs with math type FMA, which keeps TF32 out;
float16 on tensor cores with float32 sums. As for PyTorch, tensors are brought into the memory
format outside the timing.
"""

from __future__ import annotations

import weakref
from typing import Any

from ...problem import ConvProblem
from ...target import Target
from ..operands import Operands
from .base import COMPETITOR_LIMIT, Prepared
from .cudnn_library import ALGORITHMS, FORMATS, MATH_NAMES, Library, Plan, load_library


class Cudnn:
    """One of cuDNN's algorithms (a name in ALGORITHMS) in one layout (NCHW or NHWC)."""

    family = "cudnn"
    relative_limit = COMPETITOR_LIMIT

    def __init__(self, algorithm: str, layout: str, library: Library | None = None) -> None:
        self.algorithm = algorithm
        self.layout = layout
        self.name = f"cudnn:{algorithm}" + (" nhwc" if layout == "NHWC" else "")
        self._library = library

    def available(self, problem: ConvProblem, target: Target) -> str | None:
        if target.kind != "cuda":
            return f"target={target.kind}: cuDNN is for cuda"
        if problem.spatial_rank != 2:
            return f"input_size={problem.input_size}: cuDNN is called with two spatial axes"
        if any(before != after for before, after in problem.padding):
            return f"padding={problem.padding}: cuDNN takes the same before and after"
        library = self._library or load_library()
        return library if isinstance(library, str) else None

    def prepare(self, operands: Operands, target: Target) -> Prepared:
        import torch

        problem = operands.problem
        library = self._library or load_library()
        plan = Plan(library, problem, self.algorithm, self.layout)
        tensors = _tensors_for(operands)
        x, w = tensors.inputs(self.layout)
        y = tensors.output(self.layout)
        tensors.reserve(plan.workspace_bytes)

        def call() -> Any:
            stream = torch.cuda.current_stream().cuda_stream
            workspace = tensors.workspace.data_ptr()
            plan.run(x.data_ptr(), w.data_ptr(), y.data_ptr(), workspace, stream)
            return y

        def view(output: Any) -> Any:
            return output.movedim(1, -1) if problem.channels_last else output

        detail = {
            "algorithm": self.algorithm,
            "format": self.layout,
            "math_type": MATH_NAMES[problem.dtype],
            "cudnn": library.version,
        }
        return Prepared(call, plan.workspace_bytes, detail, view)


class _Tensors:
    """What the algorithms share on one problem: sixteen copies would not fit on the device.

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


_shared: weakref.WeakKeyDictionary[Operands, _Tensors] = weakref.WeakKeyDictionary()


def _tensors_for(operands: Operands) -> _Tensors:
    if operands not in _shared:
        _shared[operands] = _Tensors(operands)
    return _shared[operands]


#: Every algorithm in every format; what cuDNN does not support is a gap with its status.
CUDNN = tuple(Cudnn(algorithm, layout) for algorithm in ALGORITHMS for layout in FORMATS)
