"""Changes of layout and shape, moved behind what is computed element by element, or pooled.

`relax.transform.ConvertLayout` turns a tensor around and back for each operator that it does not
know (`maximum`, `matmul` with its reshapes), at a pass over memory each. Behind such operators two
changes meet, and are none; and what follows a convolution stands beside it, to be computed with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from .passes import extents, rewritten
from .scope import in_scope

__all__ = ["SinkViews"]

_ELEMENTWISE = {
    f"relax.{name}"
    for name in (
        "add", "subtract", "multiply", "divide", "maximum", "minimum", "clip", "astype", "sigmoid",
        "tanh", "exp", "sqrt", "rsqrt", "negative", "abs", "erf", "nn.relu", "nn.gelu",
        "nn.gelu_tanh", "nn.silu", "nn.leakyrelu",
    )
}  # fmt: skip


@dataclass(frozen=True)
class _View:
    """What a variable is: `source` with its axes in another order, or its rows in another shape."""

    source: relax.Var
    axes: tuple[int, ...] | None
    shape: tuple[int, ...]

    def like(self, other: _View | None) -> bool:
        """Whether both change the same shape in the same way."""
        same = other is not None and (self.axes, self.shape) == (other.axes, other.shape)
        return same and extents(self.source) == extents(other.source)

    def of(self, value: relax.Expr) -> relax.Expr:
        if self.axes is not None:
            return relax.op.permute_dims(value, self.axes)
        return relax.op.reshape(value, self.shape)

    def undone(self, values: np.ndarray) -> np.ndarray | None:
        """A constant that is broadcast to the view, for its source; None where it cannot be."""
        if values.size == 1:
            return values.reshape(())
        wide = values.reshape((1,) * (len(self.shape) - values.ndim) + values.shape)
        if self.axes is not None:
            return np.ascontiguousarray(wide.transpose(np.argsort(self.axes)))
        source = extents(self.source)
        if wide.size != wide.shape[-1] or wide.size != source[-1] or self.shape[-1] != source[-1]:
            return None
        return wide.reshape((1,) * (len(source) - 1) + (wide.size,))


@tvm.transform.module_pass(opt_level=0, name="SinkViews")
class SinkViews:
    """`permute_dims` and `reshape` behind elementwise operators, `concat`, and pooling."""

    @staticmethod
    def transform_module(module: tvm.IRModule, _context) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(rewritten(module, _Sink))


@relax.expr_functor.mutator
class _Sink(relax.PyExprMutator):
    def __init__(self, module: tvm.IRModule):
        super().__init__(module)
        self._views: dict[relax.Var, _View] = {}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        inner = isinstance(binding.var, relax.DataflowVar)
        value = self._rewritten(self.visit_expr(binding.value))
        if inner and isinstance(value, relax.Var):
            self.set_var_remap(binding.var, value)
            return
        output = not inner and self.builder_.current_block_is_dataflow()
        made = self.builder_.emit_output(value) if output else self.builder_.emit(value)
        self.set_var_remap(binding.var, made)
        view = _view(value)
        if view is not None and in_scope(made, view.source):
            self._views[made] = view

    def _rewritten(self, value: relax.Expr) -> relax.Expr:
        name = getattr(getattr(value, "op", None), "name", "")
        if name in ("relax.permute_dims", "relax.reshape"):
            return self._joined(value)
        if name in _ELEMENTWISE and not self._widens(value):
            return self._behind(value, list(value.args), lambda given: _call(value, given))
        if name == "relax.concat" and isinstance(value.args[0], relax.Tuple):
            parts = list(value.args[0].fields)
            first = self._views.get(parts[0])
            variables = all(isinstance(part, relax.Var) for part in parts)
            known = variables and value.attrs.axis is not None
            if known and first is not None and first.axes is not None:
                axis = first.axes[int(value.attrs.axis)]
                return self._behind(value, parts, lambda given: relax.op.concat(given, axis))
        if name in ("relax.nn.max_pool2d", "relax.mean"):
            view = self._views.get(value.args[0])
            if view is not None and view.axes is not None:
                return self._pooled(value, name, view)
        return value

    def _pooled(self, value: relax.Call, name: str, view: _View) -> relax.Expr:
        """What is reduced along rows and columns, with channels last, where they are."""
        attributes, source = value.attrs, view.source
        if name == "relax.mean":
            if not attributes.keepdims or attributes.axis is None:
                return value
            axes = [view.axes[int(axis)] for axis in attributes.axis]
            made = relax.op.mean(source, axes, keepdims=True)
        else:
            layouts = {str(attributes.layout), str(attributes.out_layout or attributes.layout)}
            if view.axes != (0, 3, 1, 2) or layouts != {"NCHW"}:
                return value
            made = relax.op.nn.max_pool2d(
                source, attributes.pool_size, attributes.strides, attributes.padding,
                attributes.dilation, attributes.ceil_mode, attributes.count_include_pad,
                layout="NHWC", out_layout="NHWC",
            )  # fmt: skip
        return relax.op.permute_dims(self.builder_.emit(made), view.axes)

    def _widens(self, value: relax.Call) -> bool:
        """Whether what is computed is larger than the views among its operands."""
        return any(self._views[a].shape != extents(value) for a in value.args if a in self._views)

    def _joined(self, value: relax.Call) -> relax.Expr:
        """Two changes as one, or none where the second undoes the first."""
        second = _view(value)
        first = self._views.get(value.args[0])
        if second is None:
            return value
        if first is not None and first.axes is not None and second.axes is not None:
            axes = tuple(first.axes[axis] for axis in second.axes)
            value = relax.op.permute_dims(first.source, axes)
            second = _View(first.source, axes, second.shape)
        elif first is not None and first.axes is None and second.axes is None:
            value = relax.op.reshape(first.source, second.shape)
            second = _View(first.source, None, second.shape)
        same = second.axes is None or second.axes == tuple(range(len(second.axes)))
        if same and extents(second.source) == second.shape:
            return second.source
        return value

    def _behind(self, value: relax.Call, arguments: list, made) -> relax.Expr:
        """The operator on the sources, and the view of what it gives."""
        view = next((self._views[a] for a in arguments if a in self._views), None)
        if view is None:
            return value
        given = []
        for argument in arguments:
            if isinstance(argument, tvm.ir.GenericConst):
                values = argument.value.numpy()
                undone = view.undone(values)
                if undone is None:
                    return value
                argument = relax.const(undone, str(values.dtype))
            elif isinstance(argument, relax.Var):
                other = self._views.get(argument)
                if not view.like(other):
                    return value
                argument = other.source
            given.append(argument)
        return view.of(self.builder_.emit(made(given)))


def _call(value: relax.Call, arguments: list) -> relax.Call:
    return relax.Call(value.op, arguments, value.attrs, value.ty_args)


def _view(value: relax.Expr) -> _View | None:
    """What a call of `permute_dims` or `reshape` on a variable is, of known shape."""
    name = getattr(getattr(value, "op", None), "name", "")
    if name not in ("relax.permute_dims", "relax.reshape"):
        return None
    source = value.args[0]
    before = extents(source)
    if not isinstance(source, relax.Var) or before is None:
        return None
    if name == "relax.reshape":
        try:
            return _View(source, None, tuple(int(n) for n in value.args[1].values))
        except (AttributeError, TypeError, ValueError):
            return None
    axes = value.attrs.axes
    axes = range(len(before))[::-1] if axes is None else [int(a) % len(before) for a in axes]
    return _View(source, tuple(axes), tuple(before[a] for a in axes))
