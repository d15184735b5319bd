"""From a schedule's module to object files or CUDA source, through TVM.

A module's functions are TensorIR of the schedule language (`s_tir`) or TIRx, TVM's language of
explicit threads, or some of each.
"""

import os
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline

from . import parsing  # noqa: F401
from .schedules.base import ALIGNMENT, ARGUMENTS, CONV, TRANSFORM
from .target import CpuTarget, CudaTarget
from .tensor_intrinsics import building

# What generated host code begins with, after its includes.
_HOST = "#define TVM_DLL TVM_FFI_DLL_EXPORT"
_NATIVE = Path(__file__).parent / "native"
_ONCE = _NATIVE / "cuda_host.cuh"
# C++ headers that it includes, and what stands in for both.
_HEADERS = (
    "#include <tvm/ffi/extra/cuda/device_guard.h>\n",
    "#include <tvm/ffi/function.h>\n",
)
_FFI = _NATIVE / "cuda_host_ffi.cuh"
# Allocated by this package, like the workspaces: they keep TVM's alignment, a cache line.
_OURS = ("packed",)


class Parameter(NamedTuple):
    """One parameter of a function of a kernel."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    alignment: int
    workspace: bool


def is_tirx(function: tirx.PrimFunc) -> bool:
    """Whether a function is TIRx and not the output of a schedule."""
    return not function.attrs.get("s_tir")


def _pipeline():
    """TVM's two lowering pipelines, each for the functions written in its language."""
    _, finalize_host, finalize_device = get_tir_pipeline("tirx")

    @tvm.transform.module_pass(opt_level=0)
    def pipeline(module: tvm.IRModule, _context) -> tvm.IRModule:
        parts = [
            get_tir_pipeline(name)[0](part)
            for name, wanted in (("s_tir", False), ("tirx", True))
            if (part := _only(module, wanted)).functions
        ]
        functions = {v: f for part in parts for v, f in part.functions_items()}
        if len(parts) > 1:
            # A pipeline that sees one function takes it for the entry of the whole module.
            functions = {v: f.without_attr(_ENTRY) for v, f in functions.items()}
        return tvm.IRModule(functions, attrs=module.attrs)

    return pipeline, finalize_host, finalize_device


def _only(module: tvm.IRModule, tirx_functions: bool) -> tvm.IRModule:
    return tirx.transform.Filter(lambda function: is_tirx(function) == tirx_functions)(module)


_PIPELINE, _ENTRY = "im2win", "tirx.is_entry_func"
register_tir_pipeline(_PIPELINE, _pipeline)


def lower(module: tvm.IRModule) -> tvm.IRModule:
    """Give every function its symbol, and every array of the caller the alignment it may have.

    TVM assumes 64 bytes for parameters and emits aligned vector loads, which fault on a NumPy
    array or a view. The natural alignment is enough unless a schedule says otherwise.
    """
    functions = {}
    for variable, function in module.functions_items():
        name = variable.name_hint
        functions[name] = _with_alignment(function).with_attr("global_symbol", name)
    return tvm.IRModule(functions)


def _with_alignment(function: tirx.PrimFunc) -> tirx.PrimFunc:
    wanted = dict(function.attrs[ALIGNMENT]) if ALIGNMENT in function.attrs else {}

    def alignment(p) -> int:
        return int(wanted.get(p.name, np.dtype(str(p.dtype)).itemsize))

    replaced = {
        p: tirx.decl_buffer(p.shape, p.dtype, p.name, data_alignment=alignment(p))
        for p in function.params
        if p.name in ARGUMENTS and p.name not in _OURS
    }
    body = tvm_ffi.structural_map(function.body, (tvm.ir.Var, lambda v: replaced.get(v, v)))
    params = [replaced.get(p, p) for p in function.params]
    return tirx.PrimFunc(params, body, function.ret_type, function.attrs)


def function_parameters(module: tvm.IRModule) -> dict[str, list[Parameter]]:
    """The parameters of each function of a lowered module, by the function's name."""
    return {
        variable.name_hint: [
            Parameter(
                p.name,
                tuple(int(extent) for extent in p.shape),
                str(p.dtype),
                int(p.data_alignment),
                p.name not in ARGUMENTS,
            )
            for p in function.params
        ]
        for variable, function in module.functions_items()
    }


def calls(module: tvm.IRModule) -> list[dict]:
    """What one call of the kernel runs, in order, with the names of the arguments."""
    parameters = function_parameters(module)
    return [
        {"function": name, "arguments": [p.name for p in parameters[name]]}
        for name in (TRANSFORM, CONV)
        if name in parameters
    ]


def write_objects(
    module: tvm.IRModule, target: CpuTarget, link: Callable[[list[str]], None]
) -> None:
    """Compile for the CPU and hand the object files to `link`."""

    def collect(_output, objects, **_options):
        link(objects)

    collect.object_format = "o"
    executable = tvm.compile(module, target=target.tvm())
    executable.export_library("kernel.so", fcompile=collect)


# Threads that compile CUDA at the moment, and what the variable below was before the first.
_compiling, _before, _guard = 0, None, threading.Lock()


@contextmanager
def _source_only():
    """Keep CUDA source as it is during `tvm.compile`, on machines with a GPU as without."""
    global _compiling, _before
    name = "TVM_COMPILE_FORCE_FALLBACK"
    with _guard:
        if _compiling == 0:
            _before = os.environ.get(name)
            os.environ[name] = "1"
        _compiling += 1
    try:
        yield
    finally:
        with _guard:
            _compiling -= 1
            if _compiling == 0 and _before is None:
                del os.environ[name]
            elif _compiling == 0:
                os.environ[name] = _before


def cuda_source(module: tvm.IRModule, target: CudaTarget) -> str:
    """One CUDA translation unit: the kernels, and the host functions that launch them."""
    from tvm.backend.cuda import export_cuda_host

    tvm_target = target.tvm()
    with _source_only(), tvm_target, building(module):
        executable = tvm.compile(module, target=tvm_target, tir_pipeline=_PIPELINE)
    source = export_cuda_host(executable.mod)
    for line in (_HOST, *_HEADERS):
        if line not in source:
            raise RuntimeError(
                f"TVM's CUDA source has no line {line.strip()!r}: this is for TVM 0.27"
            )
    source = source.replace(_HEADERS[0], _FFI.read_text()).replace(_HEADERS[1], "")
    if "cuTensorMapEncodeTiled" not in source:
        return source
    # The driver's function would be linked with its library, and called at every call.
    kernels, host, functions = source.rpartition(_HOST)
    return kernels + _ONCE.read_text() + host + functions


__all__ = [
    "Parameter",
    "calls",
    "cuda_source",
    "function_parameters",
    "is_tirx",
    "lower",
    "write_objects",
]
