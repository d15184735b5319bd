"""A Relax module to an executable, with our functions and TVM's in one library."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from .. import lower  # noqa: F401  registers the pipeline below
from ..target import Target, resolve

__all__ = ["build"]


def build(module: tvm.IRModule, target: str | Target | None = None, **options: Any):
    """`tvm.relax.build` for a module that `UseIm2win` was applied to.

    target: as in `im2win_tvm.compile`. options: those of `tvm.relax.build`. On CUDA the functions
    that are left are scheduled by DLight's defaults first. TVM's pipeline of tensor functions knows
    one language of them; this one gives each function the one that it is written in.
    """
    target = resolve(target)
    tvm_target = target.tvm("llvm") if target.kind == "cuda" else target.tvm()
    with tvm_target:
        return relax.build(module, tvm_target, tir_pipeline="im2win", **options)
