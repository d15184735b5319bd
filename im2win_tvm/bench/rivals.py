"""Whom a report compares with: a family's best, and cuDNN's best over families and by workspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["LITTLE_WORKSPACE", "Rival", "fastest", "median_us", "rivals"]

#: Up to here cuDNN counts as "without workspace": tables of indices are no copy of the input, and
#: to leave out the algorithms that keep one would flatter us.
LITTLE_WORKSPACE = 1 << 20


def median_us(entry: dict[str, Any], state: str | None = None) -> float:
    """Median in microseconds of an entry's times; without a state, cold where measured."""
    times = entry["times"]
    return times[state or next(iter(times))]["median_us"]


def fastest(
    layer: dict[str, Any], families: tuple[str, ...], most_workspace: int | None = None
) -> dict[str, Any] | None:
    """The fastest timed entry of these families, with at most that workspace in bytes."""
    timed = [
        entry
        for entry in layer["implementations"]
        if entry["family"] in families
        and entry.get("times")
        and (
            most_workspace is None
            or (entry["workspace_bytes"] is not None and entry["workspace_bytes"] <= most_workspace)
        )
    ]
    return min(timed, key=median_us, default=None)


@dataclass(frozen=True)
class Rival:
    """One side of a comparison: the fastest of some families.

    key: in tables. label: in sentences. most_workspace: bytes that it may take; None: any.
    """

    key: str
    label: str
    families: tuple[str, ...]
    most_workspace: int | None = None

    def best(self, layer: dict[str, Any]) -> dict[str, Any] | None:
        """The fastest that computed the layer; None if none did."""
        return fastest(layer, self.families, self.most_workspace)


# On CUDA PyTorch's conv2d is cuDNN too, with engines that the legacy API does not offer.
_CUDNN = ("cudnn", "torch")
_RIVALS = (
    Rival("cudnn best", "cuDNN, best of all", _CUDNN),
    Rival("cudnn no workspace", "cuDNN without workspace", _CUDNN, LITTLE_WORKSPACE),
    Rival("cublas", "im2col + cuBLAS", ("cublas",)),
    Rival("direct", "direct convolution", ("direct",)),
    Rival("tvm", "TVM", ("tvm",)),
    Rival("torch", "PyTorch", ("torch",)),
)


def rivals(record: dict[str, Any]) -> list[Rival]:
    """Those whom a record has; cuDNN's best of all only where an algorithm of its own ran."""
    entries = [e for layer in record["layers"] for e in layer["implementations"]]
    present = {e["family"] for e in entries if e["family"] != "cudnn" or e.get("times")}
    return [rival for rival in _RIVALS if rival.families[0] in present]
