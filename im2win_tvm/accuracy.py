"""Accuracy classes: how exact the outputs of a kernel are, whichever units compute them.

`fp32` is no worse than a plain float32 convolution, by one of two rules: "fast", the default, for
the inputs that `docs/accuracy.md` describes, "strict" for every input; `tf32` takes float32 tensors
and rounds the operands of every product to 10 bits of the fraction; `fp16` and `bf16` are those of
their dtypes. All of them sum in float32.
"""

from __future__ import annotations

__all__ = ["FAST", "OWN", "STRICT", "TF32", "AccuracyError", "accepted", "allowed"]

#: The class of a dtype unless another is asked for.
OWN = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
TF32 = "tf32"
#: Rules of fp32: whether schedules count whose error is not bounded for every input.
FAST, STRICT = "fast", "strict"


class AccuracyError(ValueError):
    """An accuracy class that a dtype does not have; the text says which it has."""


def allowed(dtype: str) -> tuple[str, ...]:
    """The classes of a dtype, its own first, and rules of a class."""
    return ("fp32", FAST, STRICT, TF32) if dtype == "float32" else (OWN[dtype],)


def accepted(dtype: str, accuracy: str | None = None) -> tuple[str, ...]:
    """The classes that answer a wish for `accuracy`, the preferred one first.

    None is the dtype's own, which tf32 never answers; tf32 is tf32 or better. A rule stands for its
    class. Raises AccuracyError for what the dtype does not have.
    """
    if accuracy is None or accuracy == OWN[dtype]:
        return (OWN[dtype],)
    if accuracy not in allowed(dtype):
        raise AccuracyError(
            f"accuracy={accuracy!r}: allowed for {dtype}: {' or '.join(allowed(dtype))}"
        )
    return (TF32, OWN[dtype]) if accuracy == TF32 else (OWN[dtype],)
