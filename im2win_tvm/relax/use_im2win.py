"""The pass: convolutions become calls of our functions, filters prepared ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..accuracy import allowed
from ..emulate import serial
from ..epilogue import Epilogue
from ..lower import calls, function_parameters, is_tirx, lower
from ..problem import ConvProblem, ProblemError
from ..schedules import ScheduleError
from ..schedules.base import PREPARE
from ..select import Choice, select
from ..target import Target, resolve
from .chains import Chain, chains

__all__ = ["Layer", "Report", "UseIm2win"]

_SCHEDULED, _OPAQUE = "tirx.is_scheduled", 8
_OTHERS = {
    "relax.nn.conv1d", "relax.nn.conv3d", "relax.nn.conv1d_transpose",
    "relax.nn.conv2d_transpose", "relax.nn.conv3d_transpose",
}  # fmt: skip


@dataclass
class Layer:
    """A convolution of the model: what computes it, and with what of its surroundings.

    schedule, origin: ours, and where its configuration comes from; None and the reason where TVM's
    own kernel stays.
    """

    name: str
    problem: str
    operators: list[str]
    schedule: str | None
    origin: str


@dataclass
class Report:
    """What `UseIm2win` did; its text is a table."""

    layers: list[Layer] = field(default_factory=list)

    @property
    def replaced(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.schedule is not None]

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} of {len(self.layers)} convolutions replaced"]
        wide = max((len(layer.problem) for layer in self.layers), default=0)
        for layer in self.layers:
            what = layer.schedule or "TVM"
            text = f"{'+'.join(layer.operators)}; {layer.origin}"
            lines.append(f"{layer.name:8} {layer.problem:{wide}} {what:18} {text}")
        return "\n".join(lines)


@tvm.transform.module_pass(opt_level=0, name="UseIm2win")
class UseIm2win:
    """Replace a Relax module's two-dimensional convolutions by kernels of im2win_tvm.

    target: as in `im2win_tvm.compile`. layout: that of all convolutions from here on, ``"NHWC"`` or
    ``"NCHW"``, or None to leave each as it is; conversions stand at the borders of what can follow
    it. accuracy: as in `im2win_tvm.compile`. keep: asked for each problem that a schedule takes;
    where it gives a reason, TVM's own kernel stays.

    To be applied to what an importer gives, before operators are legalized. Batch normalisation is
    folded into filters; bias, residual addition and ReLU are computed with the convolution; filters
    that are constants are prepared here, others at every call. Convolutions of symbolic shape, of
    one or three axes and transposed ones stay TVM's. `report` tells of the last module.
    Build with `im2win_tvm.relax.build`.
    """

    def __init__(
        self,
        target: str | Target | None = None,
        *,
        layout: str | None = "NHWC",
        accuracy: str | None = None,
        keep: Callable[[ConvProblem, Choice], str | None] | None = None,
    ):
        if layout not in ("NHWC", "NCHW", None):
            raise ValueError(f"layout={layout!r}: allowed are 'NHWC', 'NCHW' and None")
        self.target, self.layout = resolve(target), layout
        self.accuracy, self.keep = accuracy, keep
        self.report = Report()

    def transform_module(self, module: tvm.IRModule, _context) -> tvm.IRModule:
        self.report = Report()
        module = _simplified(module, self.layout)
        functions = _Functions(self)
        mutator = _Mutator(module, functions, self)
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                _tell_of_others(function, self.report)
                mutator.rewrite(variable, function)
        return relax.transform.DeadCodeElimination()(mutator.builder_.get())


def _simplified(module: tvm.IRModule, layout: str | None) -> tvm.IRModule:
    """With constants folded and batch normalisation taken apart, in one layout."""
    passes = [
        # It takes normalisation by the batch's own statistics for that by running ones.
        *([] if _trains(module) else [relax.transform.DecomposeOpsForInference()]),
        relax.transform.CanonicalizeBindings(),
        relax.transform.FoldConstant(),
        relax.transform.DeadCodeElimination(),
    ]
    if layout is not None:
        wanted = {"relax.nn.conv2d": [layout, "OIHW"]}
        passes = [relax.transform.ConvertLayout(wanted), relax.transform.Normalize(), *passes]
    return tvm.ir.transform.Sequential(passes)(module)


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
    for block in function.body.blocks:
        for binding in block.bindings:
            operator = getattr(getattr(binding.value, "op", None), "name", None)
            if operator in _OTHERS:
                name = operator.rpartition(".")[2]
                reason = f"{name}: allowed is conv2d; TVM's own kernel stays"
                report.layers.append(Layer(str(binding.var.name), "", [name], None, reason))


class _Functions:
    """The tensor functions of kernels, one set for equal ones, and packed filters."""

    def __init__(self, rewrite: UseIm2win):
        self.target, self.accuracy, self.keep = rewrite.target, rewrite.accuracy, rewrite.keep
        self._lowered: dict[tuple, tuple[Choice, tvm.IRModule]] = {}
        self._variables: dict[tuple, tvm.ir.GlobalVar] = {}

    def of(self, problem: ConvProblem, epilogue: Epilogue) -> tuple[Choice, tvm.IRModule]:
        """Raises ScheduleError."""
        key = problem, epilogue
        if key not in self._lowered:
            # A class of float32 says nothing of a model's other convolutions.
            accuracy = self.accuracy if self.accuracy in allowed(problem.dtype) else None
            choice = select(problem, self.target, accuracy=accuracy)
            reason = self.keep(problem, choice) if self.keep else None
            if reason is not None:
                raise ScheduleError(reason)
            module = choice.schedule.build(problem, choice.config, self.target, epilogue)
            self._lowered[key] = choice, lower(module)
        return self._lowered[key]

    def variable(self, builder, problem, epilogue, module, name: str) -> tvm.ir.GlobalVar:
        key = problem, epilogue, name
        if key not in self._variables:
            function = module[name].without_attr("global_symbol")
            function = function.with_attr(_SCHEDULED, True).with_attr("op_pattern", _OPAQUE)
            self._variables[key] = builder.add_func(function, name)
        return self._variables[key]

    @staticmethod
    def prepared(module: tvm.IRModule, w: np.ndarray) -> np.ndarray:
        """The filter in the kernel's order, made on this machine's CPU whatever the target."""
        function = module[PREPARE]
        if is_tirx(function):
            raise ScheduleError(f"{PREPARE}: written in TIRx, allowed is TensorIR")
        parameters = function_parameters(module)[PREPARE]
        library = tvm.compile(tvm.IRModule({PREPARE: serial(function)}), target="llvm").jit()
        packed = tvm.runtime.tensor(np.zeros(parameters[-1].shape, parameters[-1].dtype))
        library[PREPARE](tvm.runtime.tensor(np.ascontiguousarray(w)), packed)
        return packed.numpy()


@relax.expr_functor.mutator
class _Mutator(relax.PyExprMutator):
    def __init__(self, module: tvm.IRModule, functions: _Functions, rewrite: UseIm2win):
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
                    "relu" if chain.relu else None,
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
                reason or str(choice.origin),
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
        raise ScheduleError(f"shape={x.ty.shape}: allowed are numbers")
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
