"""TVM's intrinsics for tensor cores, which MetaSchedule's schedules refer to by name.

Kernels of TIRx say each instruction themselves and need nothing of this.
"""

from __future__ import annotations

import inspect
import sys
import threading
from contextlib import AbstractContextManager, nullcontext

import tvm
import tvm_ffi
from tvm import s_tir

__all__ = ["bare_stack", "building", "register"]

# Where the tiles of tensor cores are, in TVM's words.
_FRAGMENTS = "wmma."
_registering = threading.Lock()


def register() -> None:
    """Have TVM know its intrinsics by name. Seconds, the first time."""
    with _registering:
        if "tvm.s_tir.tensor_intrin" in sys.modules:
            return
        kept = inspect.stack
        bare_stack()
        try:
            import tvm.s_tir.tensor_intrin  # noqa: F401
        finally:
            inspect.stack = kept


def bare_stack() -> None:
    """Have `inspect.stack` read no source files in this process.

    TVM's script parser asks for the stack once a function and uses the frames alone. With the
    source lines of every frame, importing its table of tensor intrinsics takes up to a minute,
    which is more than MetaSchedule gives a process that builds.
    """

    def stack(context: int = 1) -> list[inspect.FrameInfo]:
        found, frame = [], sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            place = (code.co_filename, frame.f_lineno, code.co_name)
            found.append(inspect.FrameInfo(frame, *place, None, None))
            frame = frame.f_back
        return found

    inspect.stack = stack


def building(module: tvm.IRModule) -> AbstractContextManager:
    """The context in which TVM builds scheduled functions, those with such intrinsics too.

    TVM has buffers that do not live at the same time share memory, operands in float16 and sums in
    float32 too, and then refuses the intrinsics that read one of these. With another of its passes
    for shared memory buffers keep their dtypes.
    """
    if not any(_has_fragments(function) for function in module.functions.values()):
        return nullcontext()
    here = tvm.transform.PassContext.current()
    return tvm.transform.PassContext(
        opt_level=here.opt_level,
        required_pass=here.required_pass,
        disabled_pass=here.disabled_pass,
        config={**here.config, "tirx.merge_static_smem": True},
    )


def _has_fragments(function: object) -> bool:
    # Of TIRx there are large ones, and none has blocks.
    if not isinstance(function, tvm.tirx.PrimFunc) or not function.attrs.get("s_tir"):
        return False
    found = []

    def note(block: s_tir.SBlock) -> None:
        found.extend(b for b in block.alloc_buffers if str(b.scope()).startswith(_FRAGMENTS))

    tvm_ffi.structural_walk(function.body, (s_tir.SBlock, note))
    return bool(found)
