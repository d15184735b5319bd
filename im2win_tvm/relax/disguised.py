"""Convolutions in disguise: products along the last axis, and transposed ones without overlap.

A matrix product with a constant, of a tensor ``[N, H, W, C]`` or ``[N, C]``, is a convolution of
size 1, and so is one that is transposed and strides by its own size: each input pixel makes a patch
of its own. TVM schedules the first with little regard to its shape, and inserts zeros for the
second.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from .passes import extents, rewritten
from .scope import in_scope

__all__ = ["AsConvolutions"]

# With fewer rows and more weights a product takes what reading them takes, with all processors: TVM
# divides the sums among them, and a convolution's kernels do not.
_ROWS, _WEIGHTS = 16, 1 << 22
_TO_NHWC, _TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


@tvm.transform.module_pass(opt_level=0, name="AsConvolutions")
class AsConvolutions:
    """Such operators as `conv2d` in NHWC, between changes of shape and layout."""

    @staticmethod
    def transform_module(module: tvm.IRModule, _context) -> tvm.IRModule:
        return rewritten(module, _Mutator)


@relax.expr_functor.mutator
class _Mutator(relax.PyExprMutator):
    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        name = getattr(call.op, "name", "")
        if name == "relax.broadcast_to" and extents(call) == extents(call.args[0]) is not None:
            return call.args[0]
        if name == "relax.matmul":
            return self._product(call)
        if name == "relax.nn.conv2d_transpose":
            return self._transposed(call)
        return call

    def _product(self, call: relax.Call) -> relax.Expr:
        x, w = call.args
        shape, dtype, matrix = extents(call), str(call.ty.dtype), _matrix(w)
        if matrix is None or shape is None or extents(x) is None:
            return call
        if extents(x)[:-1] != shape[:-1] or {str(x.ty.dtype), str(w.ty.dtype)} != {dtype}:
            return call
        pixels = self._pixels(x, len(matrix), matrix.size)
        if pixels is None:
            return call
        y = self._pointwise(pixels, matrix.T, dtype)
        return y if len(shape) == 4 else relax.op.reshape(y, shape)

    def _pixels(self, x: relax.Expr, channels: int, weights: int) -> relax.Expr | None:
        """``[N, H, W, channels]`` whose rows are those of x; None where there is no such tensor."""
        if not isinstance(x, relax.Var):
            return None
        for image in (x, self._reshaped(x)):
            shape = extents(image)
            if shape is not None and len(shape) == 4 and shape[-1] == channels:
                return image
        shape = extents(x)
        if shape is None or len(shape) != 2:
            return None
        if shape[0] < _ROWS and weights > _WEIGHTS:
            return None
        return self._emit(relax.op.reshape, x, (shape[0], 1, 1, channels))

    def _reshaped(self, x: relax.Var) -> relax.Expr | None:
        """What x is a reshape of, if it is one."""
        value = self.lookup_binding(x)
        named = getattr(getattr(value, "op", None), "name", "") == "relax.reshape"
        known = named and isinstance(value.args[0], relax.Var) and in_scope(x, value.args[0])
        return value.args[0] if known else None

    def _transposed(self, call: relax.Call) -> relax.Expr:
        x, w = call.args
        attributes, shape = call.attrs, extents(x)
        plain = (
            isinstance(w, tvm.ir.GenericConst)
            and shape is not None
            and str(attributes.data_layout) == "NCHW"
            and str(attributes.kernel_layout) == "IOHW"
            and str(attributes.out_layout) in ("", "NCHW")
            and not any(map(int, [*attributes.padding, *attributes.output_padding]))
            and all(int(n) == 1 for n in [*attributes.dilation, attributes.groups])
            and len({str(x.ty.dtype), str(call.ty.dtype), str(w.value.dtype)}) == 1
        )
        if not plain or [int(n) for n in w.value.shape[2:]] != [int(n) for n in attributes.strides]:
            return call
        n, _, h, w_in = shape
        weights = w.value.numpy()
        channels, filters, rows, columns = weights.shape
        matrix = weights.transpose(2, 3, 1, 0).reshape(rows * columns * filters, channels)
        pixels = self.builder_.emit(relax.op.permute_dims(x, _TO_NHWC))
        y = self._pointwise(pixels, matrix, str(call.ty.dtype))
        patches = self._emit(relax.op.reshape, y, (n, h, w_in, rows, columns, filters))
        patches = self._emit(relax.op.permute_dims, patches, (0, 1, 3, 2, 4, 5))
        image = self._emit(relax.op.reshape, patches, (n, h * rows, w_in * columns, filters))
        return relax.op.permute_dims(image, _TO_NCHW)

    def _pointwise(self, pixels: relax.Expr, matrix: np.ndarray, dtype: str) -> relax.Expr:
        """A convolution of size 1; matrix: ``[filters, channels]``."""
        weights = np.ascontiguousarray(matrix)[:, :, None, None]
        conv = relax.op.nn.conv2d(
            pixels,
            relax.const(weights, dtype),
            data_layout="NHWC",
            kernel_layout="OIHW",
            out_layout="NHWC",
            out_dtype=dtype,
        )
        return self.builder_.emit(conv)

    def _emit(self, operator, *arguments) -> relax.Var:
        return self.builder_.emit(operator(*arguments))


def _matrix(w: relax.Expr) -> np.ndarray | None:
    """A constant matrix, also one that PyTorch repeats for each of many products."""
    if not isinstance(w, tvm.ir.GenericConst) or w.value.ndim < 2:
        return None
    values = w.value.numpy()
    first = values[(0,) * (values.ndim - 2)]
    return first if values.ndim == 2 or (values == first).all() else None
