"""A Relax module to an executable, with our functions and TVM's in one library."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.backend.cuda.pipeline import (
    dataflow_lower_passes,
    finalize_passes,
    legalize_passes,
    library_dispatch_passes,
)

from .. import lower, toolchain  # noqa: F401  lower registers the pipeline below
from ..kernel_cache import default_folder
from ..target import CudaTarget, Target, resolve
from .memory import PlanMemory

__all__ = ["build"]


def build(
    module: tvm.IRModule,
    target: str | Target | None = None,
    *,
    cuda_graph: bool | None = None,
    **options: Any,
):
    """`tvm.relax.build` for a module that `UseIm2win` was applied to.

    target: as in `im2win_tvm.compile`. cuda_graph: TVM captures what a call launches when it is
    first made, but for the kernels that read inputs or write outputs, and launches that afterwards;
    None is as the current PassContext says.
    options: those of `tvm.relax.build`.

    On CUDA the functions that are left are scheduled by DLight's defaults first, and intermediate
    tensors lie where `memory.PlanMemory` puts them. TVM's pipeline of
    tensor functions knows one language of them; this one gives each function the one that it is
    written in. Machine code is nvcc's, with the flags of single kernels, and kept in the folder of
    `KernelCache`; where there is no nvcc, it is what TVM makes.
    """
    target = resolve(target)
    if not isinstance(target, CudaTarget):
        with target.tvm():
            return relax.build(module, target.tvm(), tir_pipeline="im2win", **options)
    tvm_target = target.tvm("llvm")
    here = tvm.transform.PassContext.current()
    config = dict(here.config)
    if cuda_graph is not None:
        config["relax.backend.use_cuda_graph"] = cuda_graph
    context = tvm.transform.PassContext(
        opt_level=here.opt_level, required_pass=here.required_pass,
        disabled_pass=here.disabled_pass, config=config,
    )  # fmt: skip
    options = {"relax_pipeline": _pipeline(tvm_target), "tir_pipeline": "im2win"} | options
    with _compiled_by_nvcc(target.arch), tvm_target, context:
        return relax.build(module, tvm_target, **options)


def _pipeline(target: tvm.target.Target) -> tvm.transform.Pass:
    """TVM's own for CUDA, with our plan of memory after its."""
    passes = []
    for each in (library_dispatch_passes, legalize_passes, dataflow_lower_passes, finalize_passes):
        for found in each(target):
            passes.append(found)
            if found.info.name == "StaticPlanBlockMemory":
                passes.append(PlanMemory())
    return tvm.transform.Sequential(passes)


_CALLBACK = "tvm_callback_cuda_compile"
_building = threading.RLock()


@contextmanager
def _compiled_by_nvcc(arch: str) -> Iterator[None]:
    """Have TVM take our flags for CUDA: its own are --use_fast_math and many registers."""
    try:
        toolchain.find_nvcc()
    except toolchain.ToolchainError:
        yield
        return
    with _building:
        before = tvm_ffi.get_global_func(_CALLBACK)

        def compiled(source: str) -> bytes:
            return _cubin(source, arch)

        tvm_ffi.register_global_func(_CALLBACK, compiled, override=True)
        try:
            yield
        finally:
            tvm_ffi.register_global_func(_CALLBACK, before, override=True)


def _cubin(source: str, arch: str) -> bytes:
    """From the folder of kernels, or compiled and put there."""
    flags = Path(toolchain.__file__).read_text()  # has them all
    deciding = f"{arch}\0{toolchain.nvcc_version()}\0{flags}\0{source}"
    name = hashlib.sha256(deciding.encode()).hexdigest()[:32]
    folder = default_folder()
    path = None if folder is None else folder / f"{name}.cubin"
    if path is not None:
        with suppress(OSError):
            return path.read_bytes()
    made = toolchain.compile_cubin(source, arch)
    if path is not None:
        with suppress(OSError):  # no room, or not ours to write
            _write(path, made)
    return made


def _write(path: Path, data: bytes) -> None:
    """A file that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(data)
    os.replace(part, path)
