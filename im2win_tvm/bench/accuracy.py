"""Accuracy classes of what is measured: what may be compared with what.

`tf32` is a class of its own: float32 tensors whose products tensor cores compute from inputs of
10 mantissa bits. Such a row is shown, and is no competitor of a float32 kernel.
"""

from __future__ import annotations

import os

from ..target import Target

__all__ = ["ACCURACY", "TF32", "TF32_DTYPE", "TF32_LIMIT", "no_tf32"]

#: The class that a dtype has unless something else is said.
ACCURACY = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
TF32 = "tf32"
#: The dtype that can be computed in TF32.
TF32_DTYPE = "float32"
#: Relative error of outputs in the class. Cutting an operand to 10 bits takes at most 2^-10 of it
#: away, and a product has two operands.
TF32_LIMIT = 2 * 2.0**-10


def no_tf32(target: Target) -> str | None:
    """Why the target cannot compute in TF32 here, or None."""
    if target.kind != "cuda":
        return f"target={target.kind}: TF32 is for cuda"
    if target.capability < 80:
        return f"arch={target.arch}: TF32 needs sm_80 or later"
    # NVIDIA's libraries all obey it: the row would be float32 under another name.
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return "NVIDIA_TF32_OVERRIDE=0: the environment turns TF32 off"
    return None
