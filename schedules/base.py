"""The contract of a schedule: one object a file, with its own frozen configuration."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..accuracy import OWN
from ..activations import FUNCTIONS, instead_of_relu
from ..epilogue import NONE, Epilogue
from ..problem import ConvProblem
from ..target import Target

# Names of the functions in a schedule's module, in the order a call runs them. `prepare` depends
# on the weights alone and runs once; the others run at every call.
PREPARE, TRANSFORM, CONV = "im2win_prepare", "im2win_transform", "im2win_conv"
# Names of their parameters. Any other name is a workspace that the caller allocates.
ARGUMENTS = ("x", "w", "packed", "bias", "residual", "y")
# Attribute of a function: bytes by parameter name, where more than the natural alignment is needed.
ALIGNMENT = "im2win.alignment"


class ScheduleError(ValueError):
    """A problem or configuration that a schedule does not take; the text says why."""


class Schedule(ABC):
    """How one way of computing the convolution is laid on one kind of hardware.

    A schedule never rejects by failing: `supports` and `check` answer with a reason.
    """

    name: str
    kind: str  # of the target: "llvm" or "cuda"
    # GHz at which `estimate` counts cycles of a whole call; None: it only ranks.
    clock: float | None = None
    # Configurations come from a search alone: without a tuning record it takes no part.
    searched: bool = False

    @abstractmethod
    def check(self, config: Any, problem: ConvProblem, target: Target) -> str | None:
        """None if the configuration is valid here, otherwise what is wrong with which field."""

    @abstractmethod
    def configs(self, problem: ConvProblem, target: Target) -> Iterable[Any]:
        """Every configuration worth trying; all of them pass `check`."""

    @abstractmethod
    def default(self, problem: ConvProblem, target: Target) -> Any:
        """The heuristic's configuration."""

    def estimate(self, problem: ConvProblem, config: Any, target: Target) -> float | None:
        """The cost of a valid configuration by a model, to rank it by; None: there is no model."""
        return None

    def microseconds(self, problem: ConvProblem, config: Any, target: Target) -> float | None:
        """The time of a call by a model that was fitted to measurements, to choose schedules by.

        None: there is no such model.
        """
        if self.clock is None:
            return None
        return self.estimate(problem, config, target) / (1e3 * self.clock)

    @abstractmethod
    def schedule(self, problem: ConvProblem, config: Any, target: Target, epilogue: Epilogue):
        """The `tvm.IRModule`; called by `build` with what has passed `supports` and `check`."""

    def accuracy(self, problem: ConvProblem) -> str:
        """The accuracy class of its outputs, that of the dtype unless a schedule says otherwise.

        One that computes float32 in tf32 is a schedule with a name of its own: the class follows
        from the name wherever one is written down, in tuning records too.
        """
        return OWN[problem.dtype]

    def is_strict(self, problem: ConvProblem) -> bool:
        """Whether outputs are of their accuracy class for every input; see `docs/accuracy.md`."""
        return True

    def scratch_bytes(self, problem: ConvProblem, config: Any, target: Target) -> int:
        """Memory that each CPU thread takes for itself during a call."""
        return 0

    def supports(self, problem: ConvProblem, target: Target) -> str | None:
        """None if this schedule takes the problem on the target, otherwise the reason."""
        if target.kind != self.kind:
            return f"target={target.kind}: {self.name} is for {self.kind}"
        if problem.spatial_rank != 2:
            return f"input_size={problem.input_size}: {self.name} takes two spatial axes"
        # TVM's index arithmetic in these kernels is 32 bits wide.
        for field in ("input_shape", "weight_shape", "output_shape"):
            elements = 1
            for extent in getattr(problem, field):
                elements *= extent
            if elements >= 2**31:
                return f"{field}={getattr(problem, field)}: {self.name} takes below 2**31 elements"
        return None

    def build(
        self,
        problem: ConvProblem,
        config: Any,
        target: Target,
        epilogue: Epilogue = NONE,
    ):
        """The scheduled `tvm.IRModule`: PREPARE and CONV, and TRANSFORM where I' is explicit.

        Raises ScheduleError with the reason of `supports` or `check`.
        """
        reason = self.supports(problem, target) or self.check(config, problem, target)
        if reason is not None:
            raise ScheduleError(reason)
        if epilogue.activation in FUNCTIONS:
            relu = replace(epilogue, activation="relu")
            module = self.schedule(problem, config, target, relu)
            return instead_of_relu(module, epilogue.activation)
        return self.schedule(problem, config, target, epilogue)
