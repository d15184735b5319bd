"""cuDNN's engines by its graph API: for each memory format the fastest of all plans it can build.

The legacy API's algorithms are a selection; heuristics A, B and FALLBACK of the graph API propose
every engine. As with PyTorch's `cudnn.benchmark`, the choice is made by timing, before the
measurement: each plan is checked, timed by turns with a cold L2 cache, and the fastest of them then
takes part like everybody else.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from ...accuracy import OWN, TF32
from ...problem import ConvProblem
from ...target import Target
from .. import timing
from ..accuracy import no_tf32
from ..operands import Operands
from ..rivals import LITTLE_WORKSPACE
from .base import COMPETITOR_LIMIT, TF32_COMPETITOR_LIMIT, Prepared
from .cudnn_graph import Graph, GraphError, Plan, load_frontend
from .cudnn_library import FORMATS
from .cudnn_tensors import tensors_for

__all__ = ["CUDNN_FRONTEND", "CudnnFrontend"]

# A first call of each plan tells which are near the fastest; only these are timed again.
_FIRST = timing.Limits(warmup=0.0, seconds=0.0, least=1, most=1)
_AGAIN = timing.Limits(warmup=0.02, seconds=0.0, least=10, most=10)
_NEAR = 1.5
# Plans that a record lists, the fastest first.
_LISTED = 10


@dataclass(frozen=True)
class Candidates:
    """The plans of one graph that compute the convolution, and how many do not.

    calls: of each plan, by plan. refused: plans that cannot be built; wrong: plans that can, and
    whose output is not the convolution or whose workspace finds no room.
    """

    graph: Graph
    calls: dict[Plan, Any]
    refused: int
    wrong: int

    def ranked(self, clock: timing.Clock, most_workspace: int | None) -> list[tuple[Plan, float]]:
        """(plan, microseconds), the fastest first, of those with at most that workspace."""
        plans = {
            plan.engine: plan
            for plan in self.calls
            if most_workspace is None or plan.workspace_bytes <= most_workspace
        }
        if not plans:
            return []
        first = _medians({name: self.calls[plan] for name, plan in plans.items()}, clock, _FIRST)
        bound = _NEAR * min(first.values())
        near = {name: self.calls[plan] for name, plan in plans.items() if first[name] <= bound}
        times = first | _medians(near, clock, _AGAIN)
        # Those that were timed again first: one call alone may have been lucky.
        order = sorted(plans, key=lambda name: (name not in near, times[name]))
        return [(plans[name], times[name]) for name in order]


class CudnnFrontend:
    """The fastest plan for tensors in one layout (NCHW or NHWC).

    tf32: whether float32 may be computed in TF32. most_workspace: bytes that a plan may take.
    """

    family = "cudnn-frontend"

    def __init__(self, layout: str, tf32: bool = False, most_workspace: int | None = None) -> None:
        self.layout = layout
        self.tf32 = tf32
        self.most_workspace = most_workspace
        self.relative_limit = TF32_COMPETITOR_LIMIT if tf32 else COMPETITOR_LIMIT
        parts = ["cudnn-frontend", layout.lower(), *(["tf32"] if tf32 else [])]
        self.name = " ".join([*parts, *([] if most_workspace is None else ["little workspace"])])

    def accuracy(self, problem: ConvProblem) -> str:
        return TF32 if self.tf32 else OWN[problem.dtype]

    def available(self, problem: ConvProblem, target: Target) -> str | None:
        if target.kind != "cuda":
            return f"target={target.kind}: cuDNN is for cuda"
        if problem.spatial_rank != 2:
            return f"input_size={problem.input_size}: cuDNN is called with two spatial axes"
        if self.tf32 and (reason := no_tf32(target)):
            return reason
        frontend = load_frontend()
        return frontend if isinstance(frontend, str) else None

    def prepare(self, operands: Operands, target: Target) -> Prepared:
        problem = operands.problem
        frontend = load_frontend()
        candidates = _candidates_for(operands, frontend, self.layout, self.tf32)
        ranked = candidates.ranked(timing.clock_for(target.kind), self.most_workspace)
        if not ranked:
            raise GraphError(
                f"workspace: no plan takes at most {self.most_workspace} bytes; the least is "
                f"{min(plan.workspace_bytes for plan in candidates.calls)}"
            )
        plan, _ = ranked[0]
        detail = {
            "engine": plan.engine,
            "format": self.layout,
            "tf32": self.tf32,
            "heuristics": candidates.graph.modes,
            "plans": {
                "timed": len(ranked),
                "refused": candidates.refused,
                "wrong": candidates.wrong,
                "fastest": [
                    {"engine": each.engine, "us": us, "workspace_bytes": each.workspace_bytes}
                    for each, us in ranked[:_LISTED]
                ],
            },
            "cudnn": frontend.backend_version_string(),
            "frontend": frontend.__version__,
        }
        return Prepared(
            candidates.calls[plan], plan.workspace_bytes, detail, _view(problem.channels_last)
        )


def _medians(calls: dict[str, Any], clock: timing.Clock, limits: timing.Limits) -> dict[str, float]:
    """Microseconds by name; cold where the clock tells cache states apart."""
    times = timing.measure(calls, clock, limits)
    return {name: next(iter(states.values())).median_us for name, states in times.items()}


def _view(channels_last: bool) -> Any:
    return lambda output: output.movedim(1, -1) if channels_last else output


# By operands, layout and whether TF32 is allowed: engines compile when their plan is built.
_found: weakref.WeakKeyDictionary[Operands, dict[tuple[str, bool], Candidates]]
_found = weakref.WeakKeyDictionary()


def _candidates_for(operands: Operands, frontend: Any, layout: str, tf32: bool) -> Candidates:
    known = _found.setdefault(operands, {})
    if (layout, tf32) not in known:
        known[layout, tf32] = _candidates(operands, frontend, layout, tf32)
    return known[layout, tf32]


def _candidates(operands: Operands, frontend: Any, layout: str, tf32: bool) -> Candidates:
    """Every plan that can be built, run once and checked."""
    problem, tensors = operands.problem, tensors_for(operands)
    graph = Graph(frontend, problem, layout, tf32, tensors)
    limit = (TF32_COMPETITOR_LIMIT if tf32 else COMPETITOR_LIMIT)[problem.dtype]
    view = _view(problem.channels_last)
    calls: dict[Plan, Any] = {}
    reason = ""
    for plan in graph.plans:
        try:
            tensors.reserve(plan.workspace_bytes)
            tensors.output(layout)  # poisoned, so that the plan before does not answer for this one
            call = _call(graph, plan)
            outcome = operands.check(view(call()))
        except Exception as error:  # memory, mostly; the other plans are none the worse for it
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            continue
        if outcome.relative_error <= limit:
            calls[plan] = call
        else:
            reason = outcome.message
    if not calls:
        raise GraphError(f"none of {len(graph.plans)} plans computes the convolution: {reason}")
    return Candidates(graph, calls, graph.refused, len(graph.plans) - len(calls))


def _call(graph: Graph, plan: Plan) -> Any:
    import torch

    return lambda: graph.run(plan, torch.cuda.current_stream().cuda_stream)


#: Both formats: the best of all plans, the best with little workspace, and the best with TF32.
CUDNN_FRONTEND = (
    *(CudnnFrontend(layout) for layout in FORMATS),
    *(CudnnFrontend(layout, most_workspace=LITTLE_WORKSPACE) for layout in FORMATS),
    *(CudnnFrontend(layout, tf32=True) for layout in FORMATS),
)
