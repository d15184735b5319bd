"""Im2win convolution for TVM: tensor expressions, hand-written schedules, exported kernels.

    import im2win_tvm
    problem = im2win_tvm.ConvProblem(1, 64, (56, 56), 64, (3, 3), padding=1)
    kernel = im2win_tvm.compile(problem, target="llvm")
    y = kernel(x, w)
    kernel.export("conv.so")
    y = im2win_tvm.load("conv.so")(x, w)      # needs NumPy and apache-tvm-ffi only

Names are imported when first used, so that loading a kernel does not import TVM.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "AccuracyError": "accuracy",
    "ArgumentError": "arrays",
    "ArtifactError": "artifact",
    "ConvProblem": "problem",
    "Epilogue": "epilogue",
    "Kernel": "kernel",
    "PreparedWeights": "kernel",
    "ProblemError": "problem",
    "ScheduleError": "schedules",
    "TargetError": "target",
    "ToolchainError": "toolchain",
    "compile": "compiler",
    "load": "kernel",
    "read_metadata": "artifact",
    "suite": "suites",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*globals(), *__all__]
