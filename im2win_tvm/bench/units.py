"""How figures are written, in every table and on every chart: one place for the units."""

from __future__ import annotations

from statistics import geometric_mean

__all__ = ["bandwidth", "geomean", "microseconds", "ratio", "size", "throughput", "throughput_unit"]

_PREFIXES = ("B", "KiB", "MiB", "GiB", "TiB")
_FLOPS = {"GFLOPS": 1e9, "TFLOPS": 1e12}


def microseconds(us: float) -> str:
    """A time in microseconds: four digits or more, at most two of them decimals."""
    return f"{us:.2f}" if us < 100 else f"{us:.1f}" if us < 10_000 else f"{us:.0f}"


def throughput_unit(kind: str) -> str:
    """What a target's arithmetic is counted in: GFLOPS on processors, TFLOPS on GPUs."""
    return "TFLOPS" if kind == "cuda" else "GFLOPS"


def throughput(flops: float, us: float, unit: str) -> float:
    """Arithmetic rate in `unit` of `flops` operations in `us` microseconds."""
    return flops / (us * 1e-6) / _FLOPS[unit]


def bandwidth(moved: float, us: float) -> float:
    """GB/s (10**9 bytes a second) of `moved` bytes in `us` microseconds."""
    return moved / (us * 1e-6) / 1e9


def ratio(value: float) -> str:
    """How many times as fast."""
    return f"{value:.2f}x"


def size(count: int) -> str:
    """A number of bytes in the largest unit of 1024 that leaves at least one."""
    if count < 1024:
        return f"{count} B" if count else "0"
    value, prefix = float(count), 0
    while value >= 1024 and prefix + 1 < len(_PREFIXES):
        value /= 1024
        prefix += 1
    return f"{value:.1f} {_PREFIXES[prefix]}"


def geomean(values: list[float]) -> float | None:
    """Geometric mean; None of nothing."""
    return geometric_mean(values) if values else None
