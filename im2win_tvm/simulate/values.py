"""What the simulator computes with: functions of a mask, and the types of their values."""

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import ir

from .arrays import numpy_type
from .machine import Mask

Code = Callable[[Mask], Any]


def dtype_of(expression: Any) -> np.dtype:
    """NumPy's type of an expression's elements."""
    kind = expression.ty
    return numpy_type(str(kind.dtype) if isinstance(kind, ir.PrimType) else "int64")[0]


def wrapped(dtype: np.dtype) -> Callable[[int], int]:
    """Reduces a Python integer to the values of a type, as C's arithmetic on it does."""
    span = 1 << 8 * dtype.itemsize
    low = -(span >> 1) if dtype.kind == "i" else 0
    high = low + span
    return lambda value: value if low <= value < high else (value - low) % span + low


def cast(dtype: np.dtype) -> Callable[[Any], Any]:
    """Converts a value to a type, as C does."""
    if dtype.kind in "iu":
        wrap = wrapped(dtype)

        def integer(value):
            return value.astype(dtype) if type(value) is np.ndarray else wrap(int(value))

        return integer
    if dtype.kind == "b":
        return lambda value: value != 0 if type(value) is np.ndarray else bool(value)
    return lambda value: value.astype(dtype) if type(value) is np.ndarray else dtype.type(value)
