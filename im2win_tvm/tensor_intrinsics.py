"""TVM's intrinsics for tensor cores, which MetaSchedule's schedules refer to by name.

Kernels of TIRx say each instruction themselves and need nothing of this.
"""

from __future__ import annotations

import inspect
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir

__all__ = ["bare_stack", "bfloat16_rules", "building", "register"]

# Where the tiles of tensor cores are, in TVM's words.
_FRAGMENTS = "wmma."
# Windows, filters and products of one instruction.
_SHAPE = (16, 16, 16)
_SHARED = "shared.dyn"
_registering = threading.Lock()
_registered = False


def register() -> None:
    """Have TVM know its intrinsics by name, and those in bfloat16. Seconds, the first time."""
    global _registered
    with _registering:
        if _registered:
            return
        kept = inspect.stack
        bare_stack()
        try:
            from tvm.s_tir.tensor_intrin import cuda

            _register_bfloat16(cuda)
        finally:
            inspect.stack = kept
        _registered = True


def _register_bfloat16(cuda: Any) -> None:
    """The intrinsics in bfloat16, by the functions that make TVM's in float16.

    Sums are float32's, which TVM has. No record's version of the code knows of these: a change here
    would make another kernel of the same trace, and has to rename them.
    """
    made = {
        "wmma_load_16x16x16_bf16_a_shared_dyn": _load(cuda, False, False),
        "wmma_load_16x16x16_bf16_b_shared_dyn": _load(cuda, True, False),
        "wmma_load_16x16x16_bf16_b_trans_shared_dyn": _load(cuda, True, True),
        "wmma_sync_16x16x16_bf16bf16f32": _sync(cuda, False),
        "wmma_sync_16x16x16_bf16bf16f32_trans": _sync(cuda, True),
    }
    for name, (described, implemented) in made.items():
        s_tir.TensorIntrin.register(name, described, implemented, override=True)


def _load(cuda: Any, of_filters: bool, transposed: bool) -> tuple[Any, Any]:
    return cuda.get_wmma_load_intrin(*_SHAPE, "bfloat16", _SHARED, of_filters, transposed)


def _sync(cuda: Any, transposed: bool) -> tuple[Any, Any]:
    return cuda.get_wmma_sync_intrin(*_SHAPE, "bfloat16", "float32", transposed)


def bfloat16_rules() -> list[Any]:
    """TVM's `cuda-tensorcore` rules with tiles in bfloat16 in place of those that it has.

    These are its tiles in float16, but for vectors of 3 numbers, of which it can write none in
    bfloat16, and for the alignment in shared memory, which it leaves out in this dtype.
    """
    from tvm.s_tir import meta_schedule as ms

    register()
    rules = ms.schedule_rule
    tiles = rules.MultiLevelTilingTensorCore(
        intrin_groups=[
            {
                "init": "wmma_fill_16x16x16_f32",
                "load_a": "wmma_load_16x16x16_bf16_a_shared_dyn",
                "load_b": f"wmma_load_16x16x16_bf16_b{transposed}_shared_dyn",
                "compute": f"wmma_sync_16x16x16_bf16bf16f32{transposed}",
                "store": "wmma_store_16x16x16_f32_shared_dyn",
            }
            for transposed in ("", "_trans")
        ],
        structure="SSSRRSRS",
        tile_binds=["blockIdx.y", "blockIdx.x", "threadIdx.y"],
        max_innermost_factor=4,
        vector_load_lens=[1, 2, 4, 8],
        reuse_read=rules.ReuseType(req="must", levels=[4], scope=_SHARED),
        reuse_write=rules.ReuseType(req="must", levels=[2], scope=_SHARED),
        use_software_pipeline=False,
    )
    every = list(ms.ScheduleRule.create("cuda-tensorcore"))
    theirs = [isinstance(rule, rules.MultiLevelTilingTensorCore) for rule in every]
    first = theirs.index(True)
    others = [rule for rule, tensor in zip(every, theirs, strict=True) if not tensor]
    return [*others[:first], tiles, *others[first:]]


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
