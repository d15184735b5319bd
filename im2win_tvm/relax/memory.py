"""Memory of a module's intermediate tensors: in fewer bytes than TVM plans, sums in place.

TVM goes through a function in order and gives a tensor any storage that is free and large enough,
for as long as it lives. Here all lie in one storage, where the largest choose first and small ones
fill the gaps between large ones (Pisarchyk and Lee, Efficient Memory Management for Deep Neural Net
Inference, 2020, section 5.2: greedy by size for offset calculation). And what a convolution adds
its sums to becomes its output, where nobody reads it afterwards: our kernels read each element of a
residual before they write it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import tvm
from tvm import relax

__all__ = ["IN_PLACE", "PlanMemory"]

#: Attribute of a function: the places of a residual and of the output that may be in its memory.
IN_PLACE = "im2win.in_place"
# What CUDA's own allocations begin at multiples of, and kernels count on no more.
_ALIGNMENT = 256
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
    """One storage for the tensors that `relax.transform.StaticPlanBlockMemory` gave storages to.

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
    places, size = _places(tensors)
    # Greedy plans are no optimum, ours or TVM's; and where TVM's is as good, calls cost less.
    if size >= sum(storages.values()):
        return function
    return _in_one_storage(function, bindings, places, size)


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
    # TVM gives results no storage: the next call would write over them.
    _check(not _tensors_of(result, within, storages))
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


def _places(tensors: list[_Tensor]) -> tuple[dict[relax.Var, int], int]:
    """The byte at which each tensor begins in one storage, and the bytes of that.

    Each takes the first gap between those that live with it.
    """
    placed: list[tuple[int, _Tensor]] = []
    for tensor in sorted(tensors, key=lambda t: (-t.size, t.first)):
        place = 0
        for begin, other in placed:
            if not tensor.meets(other):
                continue
            if begin - place >= tensor.size:
                break
            end = begin + other.size
            place = max(place, end + -end % _ALIGNMENT)
        placed.append((place, tensor))
        placed.sort(key=lambda each: each[0])
    places = {variable: begin for begin, tensor in placed for variable in tensor.variables}
    return places, max(begin + tensor.size for begin, tensor in placed)


def _in_one_storage(function, bindings, places, size) -> relax.Function:
    made = []
    storage = None
    for binding in bindings:
        variable, value = binding.var, binding.value
        name = _operator(value)
        if name == _STORAGE:
            if storage is None:
                storage = relax.Var("storage", variable.ty)
                made.append(relax.VarBinding(storage, _allocated(value, size)))
            continue
        if name == _TENSOR:
            place = tvm.tirx.IntImm("int64", places[variable])
            tensor = relax.op.memory.alloc_tensor(storage, place, *value.args[2:])
            value = _typed(tensor, value)
            if places[variable]:
                # Kernels take tensors that begin where their memory does: another pointer.
                whole = relax.Var("placed", variable.ty)
                made.append(relax.VarBinding(whole, value))
                value = _typed(relax.op.memory.ensure_zero_offset(whole), value)
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
