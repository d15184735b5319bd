"""cuDNN's graph API through nvidia-cudnn-frontend: one convolution, its plans, one of them run.

A plan is an engine with its knobs set; heuristics propose many, and not all that they propose can
be built. Only what the Python module `cudnn` has had since its release 1.9 is used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from ...problem import ConvProblem
from .cudnn_tensors import Tensors

__all__ = ["INSTALL", "Graph", "GraphError", "Plan", "load_frontend"]

#: The frontend's own requirements would replace the release of apache-tvm-ffi that TVM needs here.
INSTALL = "pip install --no-deps nvidia-cudnn-frontend"
#: Heuristics asked, the first of these that cuDNN answers.
_MODES = (("A", "B", "FALLBACK"), ("A", "FALLBACK"))


class GraphError(RuntimeError):
    """A convolution for which cuDNN's graph API has no plan."""


@functools.cache
def load_frontend() -> Any:
    """The module `cudnn`, or the reason why there is none as a string."""
    if importlib.util.find_spec("cudnn") is None:
        return f"nvidia-cudnn-frontend is not installed ({INSTALL})"
    try:
        import torch  # noqa: F401  (its cuDNN first, so that both use one)

        frontend = importlib.import_module("cudnn")
    except Exception as error:  # whatever a library that does not fit this machine raises
        return f"nvidia-cudnn-frontend cannot be loaded: {type(error).__name__}: {error}"
    if not hasattr(frontend, "pygraph"):
        return f"the module cudnn is not nvidia-cudnn-frontend ({INSTALL})"
    return frontend


@dataclass(frozen=True)
class Plan:
    """One plan of a graph: its index there, its engine's name with knobs, its workspace."""

    index: int
    engine: str
    workspace_bytes: int


class Graph:
    """The forward convolution of a problem on tensors in one format, and its plans.

    layout: ``"NCHW"`` or ``"NHWC"``. tf32: whether float32 may be computed in TF32. plans: those
    that could be built, each once; refused: how many could not. Raises GraphError where there are
    none, with cuDNN's reason.
    """

    def __init__(
        self, frontend: Any, problem: ConvProblem, layout: str, tf32: bool, tensors: Tensors
    ) -> None:
        self._frontend = frontend
        self._tensors = tensors
        self._layout = layout
        self._handle = _handle(frontend)
        self._planned(problem, tf32)
        self.plans, self.refused = self._built()

    def _planned(self, problem: ConvProblem, tf32: bool) -> None:
        """Have heuristics propose plans: all that the library offers, else all but B."""
        offered = self._frontend.heur_mode
        for names in _MODES:
            self.modes = [name for name in names if hasattr(offered, name)]
            try:
                self._graph, self._bound = self._describe(problem)
                self._graph.create_execution_plans([getattr(offered, name) for name in self.modes])
                break
            except Exception as error:
                reason = _first_line(error)
        else:
            raise GraphError(f"heuristics {', '.join(self.modes)}: {reason}")
        self._graph.deselect_numeric_notes(_unwanted(self._frontend, problem.dtype, tf32))

    def _describe(self, problem: ConvProblem) -> tuple[Any, dict[Any, Any]]:
        """The graph before heuristics, and the tensor in memory of each of its tensors."""
        types = self._frontend.data_type
        kind = {"float32": types.FLOAT, "float16": types.HALF, "bfloat16": types.BFLOAT16}[
            problem.dtype
        ]
        graph = self._frontend.pygraph(
            io_data_type=kind,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=self._handle,
        )
        x, w = self._tensors.inputs(self._layout)
        y = self._tensors.output(self._layout)
        nodes = [
            graph.tensor(
                dim=list(t.shape), stride=_strides(t.shape, self._layout), data_type=kind, name=name
            )
            for t, name in ((x, "x"), (w, "w"))
        ]
        result = graph.conv_fprop(
            image=nodes[0],
            weight=nodes[1],
            pre_padding=[before for before, _ in problem.padding],
            post_padding=[after for _, after in problem.padding],
            stride=list(problem.stride),
            dilation=list(problem.dilation),
        )
        result.set_output(True)
        result.set_dim(list(y.shape))
        # Left to itself the frontend puts the output into NHWC.
        result.set_stride(_strides(y.shape, self._layout))
        result.set_data_type(kind)
        graph.validate()
        graph.build_operation_graph()
        return graph, {nodes[0]: x, nodes[1]: w, result: y}

    def _built(self) -> tuple[list[Plan], int]:
        """The plans that can be built, and how many others there are."""
        plans, names, reason = [], set(), "none was proposed"
        for index in range(self._graph.get_execution_plan_count()):
            name = self._graph.get_plan_name_at_index(index)
            if name in names:
                continue  # several heuristics proposed it
            names.add(name)
            try:
                self._graph.build_plan_at_index(index)
                size = self._graph.get_workspace_size_plan_at_index(index)
            except Exception as error:  # deselected, or not for this problem or device
                reason = _first_line(error)
                continue
            plans.append(Plan(index, name, int(size)))
        if not plans:
            raise GraphError(
                f"none of {len(names)} plans of cuDNN's engines can be built: {reason}"
            )
        return plans, len(names) - len(plans)

    def run(self, plan: Plan, stream: int) -> Any:
        """Enqueue the convolution by a plan; the output ``[N, Co, Ho, Wo]``, shared by all."""
        self._frontend.set_stream(self._handle, stream)
        workspace = self._tensors.workspace
        self._graph.execute_plan_at_index(self._bound, workspace, plan.index, handle=self._handle)
        return list(self._bound.values())[-1]


@functools.cache
def _handle(frontend: Any) -> Any:
    """One handle for all graphs. Left to the driver at exit, when the context may be gone."""
    return frontend.create_handle()


def _unwanted(frontend: Any, dtype: str, tf32: bool) -> list[Any]:
    """Numerical notes of engines that would compute in another accuracy class.

    As in PyTorch: an engine on tensor cores computes float32 in TF32, and one that converts its
    inputs down computes in a class that nobody asked for.
    """
    notes = frontend.numerical_note
    if dtype == "float32" and not tf32:
        return [notes.DOWN_CONVERT_INPUTS, notes.TENSOR_CORE]
    return [notes.DOWN_CONVERT_INPUTS]


def _strides(shape: tuple[int, ...], layout: str) -> list[int]:
    """Strides in elements of ``[N, C, H, W]``. PyTorch's are arbitrary on axes of one element."""
    _, channels, height, width = shape
    if layout == "NHWC":
        return [height * width * channels, 1, width * channels, channels]
    return [channels * height * width, height * width, width, 1]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
