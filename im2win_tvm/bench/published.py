"""The paper's own figures, to stand beside measured ones.

Source: "Im2win: An Efficient Convolution Paradigm on GPU" (arXiv 2306.14316, Euro-Par 2023), raw
logs of the authors' release (seth-lu/Im2win, branch CUDA, 2023-05-23): float32, one consumer GPU of
the RTX 3090 class. They are not comparable as they stand: the release times itself by the minimum
and its competitors by the mean of 100, leaves its transform out of the timing, and its logs match
batch 64 where the paper says 128; its layer 4 has 32 input channels in this branch. Memory figures
are of the whole process, some 0.7 GB of CUDA context included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .units import geomean

__all__ = ["ABLATION", "PAPER", "SOURCE", "Published", "kept", "kept_means", "memory", "tflops"]

SOURCE = "arXiv 2306.14316, raw logs of the authors' release, RTX 3090 class, fp32"


class Published(NamedTuple):
    """One layer: TFLOPS of each implementation and of the ablation, then process memory in MiB."""

    cublas: float
    cudnn: float
    direct: float
    im2win: float
    no_prefetch: float
    no_vector_loads: float
    no_micro_kernel: float
    cublas_mib: int
    cudnn_mib: int
    direct_mib: int
    im2win_mib: int


#: By layer of the suite `paper`.
PAPER: dict[str, Published] = {
    f"conv{number}": Published(*row)
    for number, row in enumerate(
        (
            (3.02, 4.46, 0.665, 8.02, 7.42, 6.97, 2.89, 1229, 1241, 805, 879),
            (3.05, 5.58, 0.665, 7.69, 7.32, 6.15, 2.85, 1235, 1389, 807, 883),
            (3.12, 4.63, 0.717, 3.76, 3.74, 3.58, 1.73, 1473, 1627, 1003, 1293),
            (6.85, 9.98, 0.278, 13.03, 11.46, 11.72, 7.42, 1863, 2543, 1340, 1347),
            (3.79, 19.27, 0.520, 14.50, 10.19, 8.46, 4.93, 1111, 1135, 829, 945),
            (3.83, 10.12, 0.184, 9.98, 7.27, 7.71, 4.79, 1075, 1115, 803, 869),
            (0.745, 1.65, 0.261, 1.30, 1.17, 1.24, 1.08, 2629, 2783, 1581, 1871),
            (6.25, 9.47, 0.500, 12.03, 11.56, 11.18, 5.65, 2503, 3719, 1347, 2011),
            (2.05, 6.42, 0.560, 7.30, 5.63, 4.53, 4.16, 1189, 1503, 867, 951),
            (3.33, 11.60, 0.560, 11.98, 8.45, 8.27, 5.79, 1117, 1235, 819, 959),
            (1.68, 15.57, 0.200, 12.39, 11.27, 10.15, 8.26, 1079, 1203, 761, 803),
            (0.907, 7.09, 0.049, 7.64, 6.62, 4.18, 3.29, 1067, 1295, 789, 835),
        ),
        start=1,
    )
}
#: The paper's three ablations by the names of `ablation.SWITCHES`. Its "without prefetch" also
#: drops double buffering and adds barriers.
ABLATION: dict[str, Callable[[Published], float]] = {
    "no micro-kernel": lambda row: row.no_micro_kernel,
    "no prefetch": lambda row: row.no_prefetch,
    "no vector loads": lambda row: row.no_vector_loads,
}


def tflops(family: str) -> dict[str, float]:
    """TFLOPS by layer; family: cublas, cudnn (the best of six algorithms), direct or im2win."""
    return {name: getattr(row, family) for name, row in PAPER.items()}


def memory(family: str) -> dict[str, int]:
    """Memory of the whole process by layer, in MiB; family as in `tflops`."""
    return {name: getattr(row, f"{family}_mib") for name, row in PAPER.items()}


def kept(switch: str) -> dict[str, float]:
    """Fraction of the speed that is left by layer with a switch of ABLATION off."""
    return {name: ABLATION[switch](row) / row.im2win for name, row in PAPER.items()}


def kept_means() -> dict[str, float]:
    """Geometric mean of `kept` by switch."""
    return {switch: geomean(list(kept(switch).values())) for switch in ABLATION}
