"""The im2win convolution as TVM tensor expressions; nothing here knows about hardware.

    x --transform--> I' --\
                           convolution --> epilogue --> y
    w --filter-----> F' --/

Formulas: "Im2win: An Efficient Convolution Paradigm on GPU" (arXiv 2306.14316), section 3.
"""

from .convolution import (
    convolution,
    convolution_blocked,
    convolution_gemm,
    gemm_sizes,
    window,
    window_by_offset,
    window_offsets,
)
from .epilogue import finish, output
from .filter import KAxes, filter_window, k_axes, pack_filter, window_position
from .graph import Arguments, arguments, graph
from .store import Place, tiled_function
from .transform import transform, window_columns

__all__ = [
    "Arguments",
    "KAxes",
    "Place",
    "arguments",
    "convolution",
    "convolution_blocked",
    "convolution_gemm",
    "filter_window",
    "finish",
    "gemm_sizes",
    "graph",
    "k_axes",
    "output",
    "pack_filter",
    "tiled_function",
    "transform",
    "window",
    "window_by_offset",
    "window_columns",
    "window_offsets",
    "window_position",
]
