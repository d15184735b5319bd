"""Where TF32 is, for what is measured: float32 tensors whose products tensor cores compute."""

from __future__ import annotations

import os

from ..target import Target

__all__ = ["no_tf32"]


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
