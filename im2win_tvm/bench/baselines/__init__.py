"""What is measured against what: one adapter a file, all with one interface."""

from __future__ import annotations

from ...schedules import SCHEDULES
from ...target import Target
from .base import Implementation, Prepared
from .cublas import Cublas
from .cudnn import CUDNN
from .cudnn_frontend import CUDNN_FRONTEND
from .direct import Direct
from .im2win import Im2win
from .searched import Searched
from .torch_conv import Torch
from .tvm_default import TvmDefault
from .tvm_tuned import TvmTuned

__all__ = ["COMPETITORS", "DEFAULT", "Implementation", "Prepared", "implementations"]

#: The competitors by family.
COMPETITORS: dict[str, tuple[Implementation, ...]] = {
    "cudnn": CUDNN,
    "cudnn-frontend": CUDNN_FRONTEND,
    "cublas": (Cublas(),),
    "direct": (Direct(),),
    "tvm": (TvmDefault(),),
    "tvm-tuned": (TvmTuned(),),
    "metaschedule": tuple(Searched(name) for name, s in SCHEDULES.items() if s.searched),
    "torch": tuple(Torch(last, tf32) for tf32 in (False, True) for last in (False, True)),
}
#: What is measured unless something else is asked for: they exist for every target.
DEFAULT = ("tvm", "torch")


def implementations(
    target: Target,
    against: list[str] | None = None,
    schedules: list[str] | None = None,
    config: dict | None = None,
) -> list[Implementation]:
    """The project's schedules for the target, then the competitors.

    against: families to measure against (None: DEFAULT). schedules: only these. config: for each of
    them, instead of the heuristic's. Which of them compute in the class that is asked for, and take
    part, is for `run` to say.
    """
    ours = [
        Im2win(name, config)
        for name, candidate in SCHEDULES.items()
        if (
            candidate.kind == target.kind and not candidate.searched
            if schedules is None
            else name in schedules
        )
    ]
    families = DEFAULT if against is None else against
    theirs = [entry for family in families for entry in COMPETITORS[family]]
    # Where there is no TF32 at all, its absence is no gap; nor is that of another kind of target.
    return [
        *ours,
        *(
            entry
            for entry in theirs
            if (target.kind == "cuda" or not getattr(entry, "tf32", False))
            and getattr(entry, "kind", target.kind) == target.kind
        ),
    ]
