"""Memory of a module's intermediate tensors: in fewer bytes than TVM plans, sums in place.

TVM goes through a function in order and gives a tensor any storage that is free and large enough,
where the next large one would have needed it. Here the largest tensors choose first (Pisarchyk and
Lee, Efficient Memory Management for Deep Neural Net Inference, 2020, section 4.3: greedy by size
for shared objects). And what a convolution adds its sums to becomes its output, where nobody reads
it afterwards: our kernels read each element of a residual before they write it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import tvm
from tvm import relax

__all__ = ["IN_PLACE", "PlanMemory"]

#: Attribute of a function: the places of a residual and of the output that may be in its memory.
IN_PLACE = "im2win.in_place"
_STORAGE, _TENSOR = "relax.memory.alloc_storage", "relax.memory.alloc_tensor"


@dataclass
class _Tensor:
    """Bindings from the first to the last that some tensors in the same memory live for."""

    size: int
    first: int
    last: int
    variables: list[relax.Var] = field(default_factory=list)

    def meets(self, other: _Tensor) -> bool:
        return self.first <= other.last and other.first <= self.last


class _NotPlain(Exception):
    """A function with something that is not looked through here."""


@tvm.transform.module_pass(opt_level=0, name="PlanMemory")
class PlanMemory:
    """Storages for the tensors that `relax.transform.StaticPlanBlockMemory` gave storages to.

    Functions with branches, symbolic shapes or views into storages stay as they are.
    """

    @staticmethod
    def transform_module(module: tvm.IRModule, _context) -> tvm.IRModule:
        made = module.clone()
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                try:
                    made.update_func(variable, _planned(function, module))
                except _NotPlain:
                    continue
        return made


def _planned(function: relax.Function, module: tvm.IRModule) -> relax.Function:
    if not isinstance(function.body, relax.SeqExpr):
        raise _NotPlain
    bindings = [b for block in function.body.blocks for b in block.bindings]
    if not all(isinstance(b, relax.VarBinding) for b in bindings):
        raise _NotPlain
    tensors, storages = _lives(bindings, function.body.body, module)
    if not tensors:
        return function
    assigned = _assigned(tensors)
    # Greedy plans are no optimum, ours or TVM's: the smaller one.
    if sum(dict(assigned.values()).values()) > sum(storages.values()):
        return function
    return _with_storages(function, bindings, assigned, storages)


def _lives(bindings, result, module) -> tuple[list[_Tensor], dict[relax.Var, int]]:
    """The tensors in storages, and the bytes of these by their variables."""
    storages: dict[relax.Var, int] = {}
    tensors: dict[relax.Var, _Tensor] = {}
    tuples: dict[relax.Var, relax.Tuple] = {}
    # Of each variable, the tensors whose memory it may lie in.
    within: dict[relax.Var, list[relax.Var]] = {}
    last: dict[relax.Var, int] = {}
    calls = []
    for number, binding in enumerate(bindings):
        variable, value = binding.var, binding.value
        if isinstance(value, relax.If | relax.Function):
            raise _NotPlain
        name = _operator(value)
        if name == _STORAGE:
            # All on one device, and of one kind.
            where = str(value.args[2].value), _number(value.args[1])
            size = _number(value.args[0].values[0])
            _check(where == ("global", 0) and size is not None)
            storages[variable] = size
            continue
        if name == _TENSOR:
            _check(value.args[0] in storages and _number(value.args[1]) == 0)
            tensors[variable] = _Tensor(_bytes(variable), number, number, [variable])
            within[variable] = [variable]
            continue
        if isinstance(value, relax.Tuple):
            tuples[variable] = value
        elif isinstance(value, relax.TupleGetItem) and value.tuple_value in tuples:
            value = tuples[value.tuple_value].fields[value.index]  # and none of the others
        read = _tensors_of(value, within, storages)
        for tensor in read:
            last[tensor] = number
        callee = _function(value, module)
        if isinstance(callee, tvm.tirx.PrimFunc):
            calls.append((number, value, callee))
        else:  # a view, a tuple or an unknown function's result may lie in what it was made of
            within[variable] = read
    for tensor in _tensors_of(result, within, storages):
        last[tensor] = len(bindings)
    for variable, tensor in tensors.items():
        tensor.last = last.get(variable, tensor.last)
    for number, call, callee in calls:
        _share(number, call, callee, within, tensors)
    return list({id(t): t for t in tensors.values()}.values()), storages


def _share(number, call, callee, within, tensors) -> None:
    """Have the output lie where the residual does, if that ends with this call."""
    places = (callee.attrs or {}).get(IN_PLACE)
    if places is None:
        return
    residual, output = (within.get(call.args[int(place)], []) for place in places)
    others = [
        tensor
        for place, argument in enumerate(call.args)
        if place not in [int(n) for n in places]
        for tensor in within.get(argument, [])
    ]
    if len(residual) != 1 or len(output) != 1:
        return
    before, after = tensors[residual[0]], tensors[output[0]]
    read = [tensors[tensor] for tensor in others]
    fits = before.size == after.size and before.last == number and after.first > before.first
    if before is after or not fits or any(before is tensor for tensor in read):
        return
    before.last = after.last
    before.variables += after.variables
    for variable in after.variables:
        tensors[variable] = before


def _assigned(tensors: list[_Tensor]) -> dict[relax.Var, tuple[int, int]]:
    """For each tensor the number of its storage, and the storage's size."""
    plans = [
        _plan(sorted(tensors, key=order), choice)
        for order in (
            lambda t: (-t.size, t.first), lambda t: (-t.size, -t.first), lambda t: t.first,
        )
        for choice in (
            lambda size, gap: (size, gap), lambda size, gap: (gap, size),
        )
    ]  # fmt: skip
    return {
        variable: (number, max(t.size for t in storage))
        for number, storage in enumerate(min(plans, key=_total))
        for tensor in storage
        for variable in tensor.variables
    }


def _total(plan: list[list[_Tensor]]) -> int:
    return sum(max(t.size for t in storage) for storage in plan)


def _plan(tensors: list[_Tensor], choice: Callable[[int, int], tuple]) -> list[list[_Tensor]]:
    """Storages as the tensors in them: each takes what is free for as long as it lives.

    choice: of what a storage would grow by, or is too large by, and how long it is idle before or
    after the tensor; the least is taken.
    """
    storages: list[list[_Tensor]] = []
    for tensor in tensors:
        found = []
        for storage in storages:
            if not any(tensor.meets(other) for other in storage):
                gap = min(
                    max(tensor.first - other.last, other.first - tensor.last) for other in storage
                )
                size = max(t.size for t in storage)
                found.append((choice(size, gap), storage))
        if found:
            min(found, key=lambda each: each[0])[1].append(tensor)
        else:
            storages.append([tensor])
    return storages


def _with_storages(function, bindings, assigned, old) -> relax.Function:
    made, storages = [], {}
    example = next(b for b in bindings if b.var in old)
    for binding in bindings:
        variable, value = binding.var, binding.value
        if variable in old:
            continue
        if variable in assigned:
            number, size = assigned[variable]
            if number not in storages:
                storages[number] = relax.Var(f"storage{number}", example.var.ty)
                call = _allocated(example.value, size)
                made.append(relax.VarBinding(storages[number], call))
            value = relax.op.memory.alloc_tensor(storages[number], *value.args[1:])
            value = _typed(value, binding.value)
        made.append(relax.VarBinding(variable, value))
    body = relax.SeqExpr([relax.BindingBlock(made)], function.body.body)
    body = _typed(body, function.body)
    return relax.Function(
        function.params, body, function.ret_ty, function.is_pure, function.attrs, function.span
    )


def _allocated(example: relax.Call, size: int) -> relax.Call:
    """Like another allocation of a storage, of so many bytes."""
    call = relax.op.memory.alloc_storage(relax.ShapeExpr([size]), *example.args[1:])
    return _typed(call, example)


def _typed(made: relax.Expr, like: relax.Expr) -> relax.Expr:
    relax.expr._update_type(made, like.ty)
    return made


def _operator(value) -> str:
    return getattr(getattr(value, "op", None), "name", "")


def _function(value, module):
    """The function of the module that is called, if one is."""
    callee = getattr(value, "op", None)
    known = isinstance(callee, tvm.ir.GlobalVar) and callee in module.functions
    return module[callee] if known else None


def _tensors_of(expr, within, storages) -> list[relax.Var]:
    """The tensors whose memory an expression's variables may lie in."""
    found: list[relax.Var] = []

    def visit(each):
        if isinstance(each, relax.Var):
            _check(each not in storages)
            found.extend(within.get(each, []))

    relax.analysis.post_order_visit(expr, visit)
    return list(dict.fromkeys(found))


def _check(plain: bool) -> None:
    if not plain:
        raise _NotPlain


def _number(expr) -> int | None:
    while not isinstance(expr, int) and hasattr(expr, "value"):
        expr = expr.value
    return expr if isinstance(expr, int) else None


def _bytes(variable: relax.Var) -> int:
    try:
        shape = [int(n) for n in variable.ty.shape]
    except (AttributeError, TypeError, ValueError):
        raise _NotPlain from None
    return math.prod(shape) * math.ceil(tvm.DataType(str(variable.ty.dtype)).bits / 8)
