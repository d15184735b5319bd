"""The interface of an implementation that is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...problem import ConvProblem
from ...target import Target
from ..operands import Operands


def _as_it_is(output: Any) -> Any:
    return output


@dataclass(frozen=True)
class Prepared:
    """An implementation ready to be timed on one problem.

    call: computes the output from the input once; what depends on the weights alone is done.
    view: its output as an array of problem.output_shape, outside the timing. workspace_bytes:
    memory above input, weights and output, None where the implementation does not tell.
    detail: configuration and anything that has to be stated beside the figure.
    """

    call: Callable[[], Any]
    workspace_bytes: int | None
    detail: dict[str, Any] = field(default_factory=dict)
    view: Callable[[Any], Any] = _as_it_is


class Implementation(Protocol):
    """One way to compute a convolution.

    name: unique. family: whose it is; a table compares the best of each family.
    relative_limit: relative error up to which it counts as computing the convolution at all, by
    dtype; None for the project's own, which must meet the accuracy class.
    """

    name: str
    family: str
    relative_limit: dict[str, float] | None

    def accuracy(self, problem: ConvProblem) -> str:
        """The accuracy class of its outputs; one that the dtype does not have: it is not for it."""

    def available(self, problem: ConvProblem, target: Target) -> str | None:
        """None if it can run the problem on the target here, otherwise the reason."""

    def prepare(self, operands: Operands, target: Target) -> Prepared:
        """Compile, choose, convert weights: everything that is not timed."""


#: Competitors choose algorithms of their own, Winograd or half-precision sums among them. Up to
#: here their output counts as the convolution, and their error is stated.
COMPETITOR_LIMIT = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}
#: The same with TF32 allowed: its products are as exact as those of float16.
TF32_COMPETITOR_LIMIT = {"float32": COMPETITOR_LIMIT["float16"]}
