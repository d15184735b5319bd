"""cuDNN's own forward algorithms by name, each in both memory formats, without and with TF32.

PyTorch takes one of these, or of cuDNN's newer engines, and tells neither which nor its workspace;
its better format is the family `torch`. float32 runs with math type FMA, which keeps TF32 out, and
again with DEFAULT, which lets it in: that is of class tf32, also where an algorithm makes no use of
it. float16 runs on tensor cores with float32 sums. As for PyTorch, tensors are brought into the
memory format outside the timing.
"""

from __future__ import annotations

from typing import Any

from ...accuracy import OWN, TF32
from ...problem import ConvProblem
from ...target import Target
from ..accuracy import no_tf32
from ..operands import Operands
from .base import COMPETITOR_LIMIT, TF32_COMPETITOR_LIMIT, Prepared
from .cudnn_library import ALGORITHMS, FORMATS, Library, Plan, load_library
from .cudnn_tensors import tensors_for


class Cudnn:
    """One of cuDNN's algorithms (a name in ALGORITHMS) in one layout (NCHW or NHWC).

    tf32: whether float32 may be computed in TF32.
    """

    family = "cudnn"

    def __init__(
        self, algorithm: str, layout: str, library: Library | None = None, tf32: bool = False
    ) -> None:
        self.algorithm = algorithm
        self.layout = layout
        self.tf32 = tf32
        self.relative_limit = TF32_COMPETITOR_LIMIT if tf32 else COMPETITOR_LIMIT
        parts = [f"cudnn:{algorithm}", *(["nhwc"] if layout == "NHWC" else [])]
        self.name = " ".join([*parts, *(["tf32"] if tf32 else [])])
        self._library = library

    def accuracy(self, problem: ConvProblem) -> str:
        return TF32 if self.tf32 else OWN[problem.dtype]

    def available(self, problem: ConvProblem, target: Target) -> str | None:
        if target.kind != "cuda":
            return f"target={target.kind}: cuDNN is for cuda"
        if problem.spatial_rank != 2:
            return f"input_size={problem.input_size}: cuDNN is called with two spatial axes"
        if any(before != after for before, after in problem.padding):
            return f"padding={problem.padding}: cuDNN takes the same before and after"
        if self.tf32 and (reason := no_tf32(target)):
            return reason
        library = self._library or load_library()
        return library if isinstance(library, str) else None

    def prepare(self, operands: Operands, target: Target) -> Prepared:
        import torch

        problem = operands.problem
        library = self._library or load_library()
        plan = Plan(library, problem, self.algorithm, self.layout, self.tf32)
        tensors = tensors_for(operands)
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
            "math_type": plan.math_type,
            "cudnn": library.version,
        }
        return Prepared(call, plan.workspace_bytes, detail, view)


#: Every algorithm in every format, without and with TF32; what cuDNN does not support is a gap with
#: its status.
CUDNN = tuple(
    Cudnn(algorithm, layout, tf32=tf32)
    for tf32 in (False, True)
    for algorithm in ALGORITHMS
    for layout in FORMATS
)
