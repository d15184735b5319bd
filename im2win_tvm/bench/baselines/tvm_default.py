"""What TVM does with a convolution when nobody writes a schedule: TOPI through Relax.

On CUDA the default pipeline applies DLight's rules; on the CPU it leaves the loop nest as TOPI
wrote it, vectorised by LLVM where that is possible, on one thread.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np

from ... import toolchain
from ...accuracy import OWN
from ...problem import ConvProblem
from ...target import CpuTarget, Target
from ...tensor_intrinsics import building
from ..operands import Operands
from .base import COMPETITOR_LIMIT, Prepared


class TvmDefault:
    """`R.nn.conv2d`, compiled by TVM's own default pipeline for the target."""

    name = "tvm"
    family = "tvm"
    relative_limit = COMPETITOR_LIMIT

    def accuracy(self, problem: ConvProblem) -> str:
        return OWN[problem.dtype]

    def available(self, problem: ConvProblem, target: Target) -> str | None:
        if problem.spatial_rank != 2:
            return f"input_size={problem.input_size}: conv2d takes two spatial axes"
        return None

    def sums(self, problem: ConvProblem) -> str:
        """The dtype that products are summed in."""
        return problem.dtype

    def module(self, problem: ConvProblem, target: Target, tvm_target: Any) -> tuple[Any, dict]:
        """The IRModule that the default pipeline gets, and what a record says of it."""
        detail: dict[str, Any] = {"pipeline": "TVM's default for the target"}
        if isinstance(target, CpuTarget):
            detail["threads"] = 1
        return relax_module(problem), detail

    def prepare(self, operands: Operands, target: Target) -> Prepared:
        import tvm
        from tvm import relax

        problem = operands.problem
        on_cpu = isinstance(target, CpuTarget)
        device = tvm.cpu() if on_cpu else tvm.cuda()
        if not on_cpu:
            choose_cuda_compiler()
        tvm_target = tvm_target_here(target)
        module, detail = self.module(problem, target, tvm_target)
        if problem.itemsize == 2:
            detail["accumulates"] = self.sums(problem)
        # `with`: CUDA's architecture is taken from the current target.
        with tvm_target, building(module):
            executable = tvm.compile(module, target=tvm_target)
        main = relax.VirtualMachine(executable, device)["main"]
        x, w = operands.x, operands.w
        if on_cpu:
            w = np.moveaxis(w, 1, -1) if problem.channels_last else w
            # Copied, because TVM asks for arrays on a multiple of 64 bytes.
            x, w = tvm.runtime.tensor(x), tvm.runtime.tensor(np.ascontiguousarray(w))
        else:
            w = w.movedim(1, -1).contiguous() if problem.channels_last else w
            x, w = tvm.runtime.from_dlpack(x), tvm.runtime.from_dlpack(w)

        def call() -> Any:
            return main(x, w)

        return Prepared(call, None, detail, _as_numpy if on_cpu else _as_torch)


def tvm_target_here(target: Target) -> Any:
    """The `tvm.target.Target` of the device here: on CUDA with what the device tells of itself."""
    import tvm

    if isinstance(target, CpuTarget):
        return target.tvm()
    return tvm.target.Target.from_device(tvm.cuda())


def relax_module(problem: ConvProblem, sums: str | None = None) -> Any:
    """A Relax module with `main(x, w)`; w in OIHW, or in OHWI where channels are last.

    sums: the dtype of conv2d's output, which is then cast; None is the problem's.
    """
    from tvm import relax

    (top, bottom), (left, right) = problem.padding
    channels, per_group, *kernel = problem.weight_shape
    last = problem.channels_last
    shape = (channels, *kernel, per_group) if last else problem.weight_shape
    x = relax.Var("x", relax.TensorType(problem.input_shape, problem.dtype))
    w = relax.Var("w", relax.TensorType(shape, problem.dtype))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, w]):
        with builder.dataflow():
            y = relax.op.nn.conv2d(
                x,
                w,
                strides=problem.stride,
                padding=(top, left, bottom, right),
                dilation=problem.dilation,
                groups=problem.groups,
                data_layout=problem.layout,
                kernel_layout="OHWI" if last else "OIHW",
                out_dtype=sums or problem.dtype,
            )
            if sums not in (None, problem.dtype):
                y = relax.op.astype(builder.emit(y), problem.dtype)
            y = builder.emit_output(builder.emit(y))
        builder.emit_func_output(y)
    return builder.get()


def choose_cuda_compiler() -> None:
    """Let TVM compile with nvcc where NVRTC's Python bindings, its default, are not installed."""
    if importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"):
        return
    os.environ.setdefault("TVM_CUDA_COMPILE_MODE", "nvcc")
    folder = str(toolchain.find_nvcc().bin)
    if folder not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] += os.pathsep + folder


def _as_numpy(y: Any) -> Any:
    return y.numpy()


def _as_torch(y: Any) -> Any:
    import torch

    return torch.from_dlpack(y)
