"""When a call of PyTorch's operator may leave out PyTorch's dispatcher."""

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.overrides import BaseTorchFunctionMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from im2win_tvm.torch.direct import nothing_between  # noqa: E402


class Subclass(torch.Tensor):
    """Not PyTorch's own: its `__torch_function__` may do anything."""


def test_plain_tensors():
    x = torch.ones(2, 3)
    frozen = torch.nn.Parameter(x, requires_grad=False)
    assert nothing_between(x, frozen, None)
    assert nothing_between(x.half(), x[:1], x)
    graded = torch.nn.Parameter(x)
    assert not nothing_between(x, graded, None)
    with torch.no_grad():
        assert nothing_between(x, graded, None)
    with torch.inference_mode():
        assert nothing_between(torch.ones(2), graded, x)


def test_others():
    x = torch.ones(2, 3)
    assert not nothing_between(x, x.as_subclass(Subclass), None)
    assert not nothing_between(torch._neg_view(x), x, None)
    assert not nothing_between(x.to_sparse(), x, None)
    assert not nothing_between(x.to("meta"), x, None)
    for mode in (
        torch.autocast("cpu"), FlopCounterMode(display=False), BaseTorchFunctionMode(),
        torch.autograd.profiler.profile(), torch.device("meta"),
    ):  # fmt: skip
        with mode:
            assert not nothing_between(x, x, None), mode
    assert nothing_between(x, x, None)


def test_transformations_and_tracers():
    x, found = torch.ones(2, 3), []

    def function(x):
        found.append(nothing_between(x, x, None))
        return x + 1

    torch.vmap(function)(x)
    torch.func.grad(lambda x: function(x).sum())(x)
    torch.func.functionalize(function)(x)
    torch.jit.trace(function, (x,), check_trace=False)
    torch.fx.experimental.proxy_tensor.make_fx(function)(x)
    torch.compile(function, backend="eager", fullgraph=True)(x)
    assert len(found) >= 5 and not any(found)
