"""The pass: convolutions become calls of our functions, filters prepared ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..epilogue import Epilogue
from ..lower import calls, function_parameters
from ..problem import ConvProblem, ProblemError
from ..schedules import ScheduleError
from ..schedules.base import PREPARE
from ..select import Choice
from ..target import Target, resolve
from .chains import Chain, chains
from .constants import FoldConstants
from .disguised import AsConvolutions
from .ends import QuickEnds
from .functions import Functions
from .joining import JoinPatches
from .measured import Comparison, compare
from .normalisation import NormaliseByRows
from .pooling import PoolByPixels
from .report import Layer, Report
from .views import SinkViews

__all__ = ["Layer", "Report", "UseIm2win"]

#: Ways to choose between our kernel and TVM's own.
CHOICES = ("all", "measured")
_OTHERS = {
    "relax.nn.conv1d", "relax.nn.conv3d", "relax.nn.conv1d_transpose",
    "relax.nn.conv2d_transpose", "relax.nn.conv3d_transpose",
}  # fmt: skip


@tvm.transform.module_pass(opt_level=0, name="UseIm2win")
class UseIm2win:
    """Replace a Relax module's two-dimensional convolutions by kernels of im2win_tvm.

    target: as in `im2win_tvm.compile`. layout: that of all convolutions from here on, ``"NHWC"`` or
    ``"NCHW"``, or None to leave each as it is; conversions stand at the borders of what can follow
    it. accuracy: as in `im2win_tvm.compile`. choice: "all", or "measured", which builds and times
    each distinct convolution both ways on the machine that this is, where TVM's own kernel stays if
    it is faster. keep: asked for each problem that a schedule takes; where it gives a reason, TVM's
    own kernel stays.

    To be applied to what an importer gives, before operators are legalized. Batch normalisation is
    folded into filters; bias, residual addition, ReLU, ReLU6 and GELU are computed with the
    convolution; filters that are constants are prepared here, others at every call. In NHWC,
    products with constant matrices and transposed convolutions that do not overlap are
    convolutions, too (see `disguised`). Convolutions of symbolic shape (see `specialise`), of one
    or three axes, other transposed ones and those in branches stay TVM's. `report` tells of the
    last module. Build with `im2win_tvm.relax.build`.
    """

    def __init__(
        self,
        target: str | Target | None = None,
        *,
        layout: str | None = "NHWC",
        accuracy: str | None = None,
        choice: str = "all",
        keep: Callable[[ConvProblem, Choice], str | None] | None = None,
    ):
        if layout not in ("NHWC", "NCHW", None):
            raise ValueError(f"layout={layout!r}: allowed are 'NHWC', 'NCHW' and None")
        self.target, self.layout = resolve(target), layout
        if choice not in CHOICES:
            raise ValueError(f"choice={choice!r}: allowed are {', '.join(map(repr, CHOICES))}")
        self.accuracy, self.choice, self.keep = accuracy, choice, keep
        self.report = Report()

    def transform_module(self, module: tvm.IRModule, _context) -> tvm.IRModule:
        self.report = Report()
        module = _simplified(module, self.layout)
        if self.target.kind == "cuda":
            passes = [PoolByPixels(), NormaliseByRows(), JoinPatches(), QuickEnds()]
            module = tvm.ir.transform.Sequential(passes)(module)
        measured = _compared if self.choice == "measured" else None
        functions = Functions(self.target, self.accuracy, measured, self.keep)
        mutator = _Mutator(module, functions, self)
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                _tell_of_others(function, self.report)
                mutator.rewrite(variable, function)
        return relax.transform.DeadCodeElimination()(mutator.builder_.get())


def _compared(problem: ConvProblem, target: Target, accuracy: str | None) -> Comparison:
    """One convolution in its own layout, measured as ours and as TVM's."""
    return compare(problem, target, UseIm2win(target, layout=None, accuracy=accuracy))


def _simplified(module: tvm.IRModule, layout: str | None) -> tvm.IRModule:
    """With constants folded and batch normalisation taken apart, in one layout."""
    passes = [
        # It takes normalisation by the batch's own statistics for that by running ones.
        *([] if _trains(module) else [relax.transform.DecomposeOpsForInference()]),
        relax.transform.CanonicalizeBindings(),
        FoldConstants(),
        relax.transform.FoldConstant(),
        relax.transform.DeadCodeElimination(),
    ]
    if layout is not None:
        wanted = {
            "relax.nn.conv2d": [layout, "OIHW"],
            "relax.nn.conv2d_transpose": ["NCHW", "IOHW"],  # TVM has no other kernel
        }
        converted = relax.transform.ConvertLayout(wanted), relax.transform.Normalize()
        # Constants have the rank of what they are added to before it changes the order of axes.
        passes = [relax.transform.CanonicalizeBindings(), FoldConstants(), *converted, *passes]
    if layout == "NHWC":
        passes += [AsConvolutions(), relax.transform.CanonicalizeBindings(), SinkViews()]
    return tvm.ir.transform.Sequential([relax.transform.ConvertToDataflow(1), *passes])(module)


def _trains(module: tvm.IRModule) -> bool:
    """Whether anything is normalised by the statistics of the batch."""
    found = []

    def visit(expr):
        if isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == "relax.nn.batch_norm":
            found.append(bool(expr.attrs.training))

    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return any(found)


def _tell_of_others(function: relax.Function, report: Report) -> None:
    """Convolutions that are not looked at: of other kinds, and in branches."""
    names = {b.value: str(b.var.name) for block in function.body.blocks for b in block.bindings}

    def visit(expr):
        operator = getattr(getattr(expr, "op", None), "name", None)
        name = str(operator).rpartition(".")[2]
        if operator in _OTHERS:
            reason = f"{name}: allowed is conv2d; TVM's own kernel stays"
        elif operator == "relax.nn.conv2d" and expr not in names:
            reason = "in a branch: allowed is outside of them; TVM's own kernel stays"
        else:
            return
        report.layers.append(Layer(names.get(expr, ""), "", [name], None, reason))

    relax.analysis.post_order_visit(function, visit)


@relax.expr_functor.mutator
class _Mutator(relax.PyExprMutator):
    def __init__(self, module: tvm.IRModule, functions: Functions, rewrite: UseIm2win):
        super().__init__(module)
        self.functions, self.report = functions, rewrite.report
        self._ends: dict[Any, tuple] = {}
        self._within: set[Any] = set()

    def rewrite(self, variable: tvm.ir.GlobalVar, function: relax.Function) -> None:
        for chain in chains(function):
            problem, reason = None, None
            try:
                problem = _problem(chain)
                epilogue = Epilogue(
                    chain.shift is not None,
                    chain.residual is not None,
                    chain.activation,
                )
                choice, lowered = self.functions.of(problem, epilogue)
            except (ProblemError, ScheduleError) as error:
                reason = str(error)
            shown = "" if problem is None else f"{problem} {problem.dtype} {problem.layout}"
            layer = Layer(
                str(chain.last.var.name),
                shown,
                chain.operators if reason is None else ["conv2d"],
                None if reason else choice.schedule.name,
                reason or self.functions.origin(problem, choice),
                problem,
            )
            self.report.layers.append(layer)
            if reason is None:
                self._ends[chain.last.var] = chain, problem, epilogue, lowered
                self._within.update(binding.var for binding in chain.bindings[:-1])
        self.builder_.update_func(variable, self.visit_expr(function))

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var in self._within:
            return
        if binding.var not in self._ends:
            super().visit_var_binding_(binding)
            return
        value = self._call(*self._ends[binding.var])
        inner = isinstance(binding.var, relax.DataflowVar)
        made = self.builder_.emit(value) if inner else self.builder_.emit_output(value)
        self.set_var_remap(binding.var, made)

    def _call(
        self, chain: Chain, problem: ConvProblem, epilogue: Epilogue, module: tvm.IRModule
    ) -> relax.Call:
        """What runs the kernel's functions; the last is left to be bound."""
        x, w = (self.visit_expr(argument) for argument in chain.call.args)
        values = {"x": x, "packed": self._packed(chain, w, problem, epilogue, module)}
        if chain.shift is not None:
            values["bias"] = relax.const(chain.shift.astype(problem.dtype), problem.dtype)
        if chain.residual is not None:
            values["residual"] = self.visit_expr(chain.residual)
        parameters = function_parameters(module)
        *first, last = calls(module)
        for call in first:
            made = self._tensor_call(call, parameters, values, problem, epilogue, module)
            values[call["arguments"][-1]] = self.builder_.emit(made)
        return self._tensor_call(last, parameters, values, problem, epilogue, module)

    def _tensor_call(self, call, parameters, values, problem, epilogue, module) -> relax.Call:
        """An output is the last parameter."""
        name, made = call["function"], parameters[call["function"]][-1]
        variable = self.functions.variable(self.builder_, problem, epilogue, module, name)
        arguments = [values[argument] for argument in call["arguments"][:-1]]
        return relax.call_tir(variable, arguments, relax.TensorType(made.shape, made.dtype))

    def _packed(self, chain, w, problem, epilogue, module) -> relax.Expr:
        made = function_parameters(module)[PREPARE][-1]
        if isinstance(w, tvm.ir.GenericConst):
            values = _oihw(w.value.numpy(), chain.call)
            if chain.scale is not None:
                scaled = values.astype("float64") * chain.scale[:, None, None, None]
                values = scaled.astype(values.dtype)
            return relax.const(self.functions.prepared(module, values), made.dtype)
        variable = self.functions.variable(self.builder_, problem, epilogue, module, PREPARE)
        call = relax.call_tir(variable, [w], relax.TensorType(made.shape, made.dtype))
        return self.builder_.emit(call)


def _oihw(values: np.ndarray, conv: relax.Call) -> np.ndarray:
    return values.transpose([conv.attrs.kernel_layout.index(axis) for axis in "OIHW"])


def _problem(chain: Chain) -> ConvProblem:
    """Raises ProblemError or ScheduleError where a chain is none of ours."""
    call = chain.call
    attributes, (x, w) = call.attrs, call.args
    layout = str(attributes.data_layout)
    if layout not in ("NCHW", "NHWC") or str(attributes.out_layout or layout) != layout:
        raise ScheduleError(f"data_layout={layout!r}: allowed are 'NCHW' and 'NHWC'")
    dtypes = {str(x.ty.dtype), str(w.ty.dtype), str(call.ty.dtype)}
    if len(dtypes) > 1:
        raise ScheduleError(f"dtypes {', '.join(sorted(dtypes))}: allowed is one")
    shape, weight = _numbers(x.ty.shape), _numbers(w.ty.shape)
    if shape is None or weight is None:
        raise ScheduleError(
            f"shape={(x if shape is None else w).ty.shape}: allowed are numbers; for batches of "
            "any size see im2win_tvm.relax.specialise"
        )
    constant = isinstance(w, tvm.ir.GenericConst)
    if not constant and (chain.scale is not None or str(attributes.kernel_layout) != "OIHW"):
        raise ScheduleError("weight: not a constant, so that nothing can be folded into it")
    place = {axis: n for axis, n in zip(layout, shape, strict=True)}
    weights = {axis: n for axis, n in zip(str(attributes.kernel_layout), weight, strict=True)}
    top, left, bottom, right = (int(n) for n in attributes.padding)
    return ConvProblem(
        place["N"], place["C"], (place["H"], place["W"]), weights["O"],
        (weights["H"], weights["W"]), tuple(map(int, attributes.strides)),
        ((top, bottom), (left, right)), tuple(map(int, attributes.dilation)),
        int(attributes.groups), dtypes.pop(), layout,
    )  # fmt: skip


def _numbers(shape) -> list[int] | None:
    try:
        return [int(n) for n in shape]
    except (TypeError, ValueError):  # symbolic, or unknown
        return None
