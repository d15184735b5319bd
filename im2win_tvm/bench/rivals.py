"""Whom a report compares with: a family's best, and cuDNN's best over families and by workspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..accuracy import OWN, accepted

__all__ = [
    "CUDNN_FAMILIES",
    "LITTLE_WORKSPACE",
    "NO_WORKSPACE",
    "Rival",
    "accuracy",
    "fastest",
    "median_us",
    "rivals",
    "wanted",
]

#: Up to here a workspace counts as little: tables of indices are no copy of the input.
LITTLE_WORKSPACE = 1 << 20
#: cuDNN's forward algorithms that form the im2col matrix nowhere in memory. The second may ask for
#: some workspace all the same, for its indices; how much is in the record, by cuDNN's own figure.
NO_WORKSPACE = ("IMPLICIT_GEMM", "IMPLICIT_PRECOMP_GEMM")
#: cuDNN by its legacy API, by its graph API, and as PyTorch uses it.
CUDNN_FAMILIES = ("cudnn", "cudnn-frontend", "torch")


def median_us(entry: dict[str, Any], state: str | None = None) -> float:
    """Median in microseconds of an entry's times; without a state, cold where measured."""
    times = entry["times"]
    return times[state or next(iter(times))]["median_us"]


def accuracy(layer: dict[str, Any], entry: dict[str, Any]) -> str:
    """The accuracy class of an entry; the dtype's own where the record names none."""
    return entry.get("accuracy") or OWN[layer["dtype"]]


def wanted(layer: dict[str, Any]) -> str:
    """The accuracy class that a layer was measured for; the dtype's own unless it says so."""
    return layer.get("accuracy") or OWN[layer["dtype"]]


def fastest(
    layer: dict[str, Any],
    families: tuple[str, ...],
    most_workspace: int | None = None,
    algorithms: tuple[str, ...] = (),
    of_class: str | None = None,
) -> dict[str, Any] | None:
    """The fastest timed entry of these families, or None.

    most_workspace: bytes that it may take. algorithms: cuDNN's names, empty for any. of_class:
    its accuracy class, None for any that answers the layer's: tf32 is none of float32, while what
    is measured for tf32 may be better.
    """
    classes = (of_class,) if of_class else accepted(layer["dtype"], wanted(layer))

    def counts(entry: dict[str, Any]) -> bool:
        if entry["family"] not in families or not entry.get("times"):
            return False
        if accuracy(layer, entry) not in classes:
            return False
        if algorithms and entry.get("detail", {}).get("algorithm") not in algorithms:
            return False
        taken = entry["workspace_bytes"]
        return most_workspace is None or (taken is not None and taken <= most_workspace)

    return min(filter(counts, layer["implementations"]), key=median_us, default=None)


@dataclass(frozen=True)
class Rival:
    """One side of a comparison: the fastest of some families, in the layer's accuracy class.

    key: in tables. label: in sentences. most_workspace: bytes that it may take; None: any.
    algorithms: only cuDNN's of these names; empty: any.
    """

    key: str
    label: str
    families: tuple[str, ...]
    most_workspace: int | None = None
    algorithms: tuple[str, ...] = ()

    def best(self, layer: dict[str, Any]) -> dict[str, Any] | None:
        """The fastest that computed the layer; None if none did."""
        return fastest(layer, self.families, self.most_workspace, self.algorithms)


_BEST = Rival("cudnn best", "cuDNN, best of all", CUDNN_FAMILIES)
_IMPLICIT = Rival(
    "cudnn no workspace",
    "cuDNN's algorithms without workspace",
    ("cudnn",),
    algorithms=NO_WORKSPACE,
)
# Beside it, because other engines, too, may do with little.
_LITTLE = Rival(
    "cudnn up to 1 MiB",
    "cuDNN, at most 1 MiB of workspace",
    CUDNN_FAMILIES,
    most_workspace=LITTLE_WORKSPACE,
)
_OTHERS = (
    Rival("cublas", "im2col + cuBLAS", ("cublas",)),
    Rival("direct", "direct convolution", ("direct",)),
    Rival("tvm", "TVM", ("tvm",)),
    Rival("tvm-tuned", "TVM tuned", ("tvm-tuned",)),
    Rival("torch", "PyTorch", ("torch",)),
)


def rivals(record: dict[str, Any]) -> list[Rival]:
    """Those whom a record has; cuDNN's only where its own API ran: PyTorch may run on a CPU."""
    entries = [e for layer in record["layers"] for e in layer["implementations"]]
    present = {entry["family"] for entry in entries}
    ran = {entry["family"] for entry in entries if entry.get("times")}
    found = [rival for rival in _OTHERS if rival.families[0] in present]
    if "cudnn" in ran:
        return [_BEST, _IMPLICIT, _LITTLE, *found]
    return [_BEST, _LITTLE, *found] if "cudnn-frontend" in ran else found
