"""Whether a call of an operator may go to its function without PyTorch's dispatcher.

The dispatcher takes a call of an operator in Python through autograd, autocast and whatever modes
there are: half of what a convolution costs the host, mostly to find that there is nothing to do.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["nothing_between"]


def _keys(*names: str) -> int:
    made = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        made = made | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return made.raw_repr()


try:
    # What a thread includes by itself, also in inference mode; tracers, transformations of
    # functions and modes that see each operator add to it.
    _THREAD = frozenset({_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect")})
    # Of tensors as they are made, also in inference mode.
    _TENSOR = frozenset(
        _keys(device, f"Autocast{device}", *more)
        for device in ("CPU", "CUDA")
        for more in ((), ("ADInplaceOrView", f"Autograd{device}"))
    )
    _included = torch._C._dispatch_tls_local_include_set
    _of_tensor = torch._C._dispatch_keys
    _functions = torch._C._len_torch_function_stack
    _profiled = torch.autograd._profiler_enabled
except (AttributeError, TypeError):  # another PyTorch: everything goes through its dispatcher
    _THREAD = frozenset()
_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})


def nothing_between(*tensors: torch.Tensor | None) -> bool:
    """Whether the dispatcher would do nothing but call the operator's function for these tensors.

    Not so where gradients are wanted, in forward mode, under autocast, `torch.compile`,
    transformations, modes and the profiler, and for tensors of other kinds than PyTorch's own.
    False for a PyTorch that does not tell.
    """
    if torch.compiler.is_compiling() or not _THREAD:
        return False
    if _included().raw_repr() not in _THREAD or _functions() or _profiled():
        return False
    if forward_ad._current_level >= 0:  # of nested `dual_level`s, from 0
        return False
    graded = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        plain = type(tensor) in _TYPES and _of_tensor(tensor).raw_repr() in _TENSOR
        if not plain or (graded and tensor.requires_grad):
            return False
    return not torch.is_autocast_enabled(tensors[0].device.type)
