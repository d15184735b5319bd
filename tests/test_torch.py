"""Convolutions as PyTorch's operator, against PyTorch's own."""

import warnings
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import library  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch_operands import CASES, assert_same, forget, operands  # noqa: E402

import im2win_tvm.torch as ours  # noqa: E402
from im2win_tvm import AccuracyError, reference  # noqa: E402
from im2win_tvm.problem import ConvProblem  # noqa: E402
from im2win_tvm.torch import operator, weights  # noqa: E402

nn, F = torch.nn, torch.nn.functional
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
every_format = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)


@pytest.fixture(autouse=True)
def without_kernels(tmp_path, monkeypatch):
    forget(tmp_path, monkeypatch)


@every_case
@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_values(case, memory_format, dtype):
    x, w, b, stride, padding, dilation, groups = operands(case, dtype, memory_format)
    n, c, *size = x.shape
    problem = ConvProblem(
        n, c, tuple(size), len(w), tuple(w.shape[2:]), stride, padding, dilation, groups
    )
    expected = reference.conv2d(x.numpy(), w.numpy(), problem, None if b is None else b.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = ours.conv2d(x, w, b, stride, padding, dilation, groups)
    assert y.is_contiguous(memory_format=memory_format) and y.dtype == dtype
    np.testing.assert_array_equal(y.double().numpy(), expected)


@pytest.mark.parametrize(
    ("case", "memory_format"), [("plain", "first"), ("all", "last"), ("depthwise", "first")]
)
def test_the_operator_is_one_of_pytorchs(case, memory_format):
    x, w, b, *rest = operands(CASES[case], memory_format=FORMATS[memory_format])
    given = (x.requires_grad_(), w.requires_grad_(), b, *rest)
    library.opcheck(torch.ops.im2win.conv2d, given)


@every_case
@every_format
def test_gradients(case, memory_format):
    x, w, b, *rest = operands(case, memory_format=memory_format)
    inputs = [t.requires_grad_() for t in (x, w, b) if t is not None]
    y, expected = ours.conv2d(x, w, b, *rest), F.conv2d(x, w, b, *rest)
    weights = torch.randint(-2, 3, y.shape).float()
    for actual, wanted in zip(
        torch.autograd.grad(y, inputs, weights),
        torch.autograd.grad(expected, inputs, weights),
        strict=True,
    ):
        assert_same(actual, wanted)


def test_views_that_begin_or_step_anywhere():
    x, w, b, *rest = operands(CASES["plain"])
    expected = F.conv2d(x, w, b, *rest)
    shifted = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    for view in (shifted, transposed):
        assert_same(ours.conv2d(view, w, b, *rest), expected)
    assert_same(ours.conv2d(x, w.transpose(0, 1).contiguous().transpose(0, 1), b, *rest), expected)
    empty = x[:0]
    assert ours.conv2d(empty, w, b, *rest).shape == F.conv2d(empty, w, b, *rest).shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x[0], w, b), "input of 3 and weight of 4 dimensions"),
        (lambda x, w, b: (x[:, :2], w, b), "2 channels; weight and groups=1 take 3"),
        (
            lambda x, w, b: (x, w.double(), b),
            r"weight is torch.float64 on .*, input torch.float32 on",
        ),
        (lambda x, w, b: (x, w, torch.ones(4)), r"bias of shape \(4,\): allowed is \(5,\)"),
    ],
)
def test_operands_that_do_not_fit(change, message):
    x, w, b, *rest = operands(CASES["plain"])
    with pytest.raises(RuntimeError, match=message):
        ours.conv2d(*change(x, w, b), *rest)
    with pytest.raises(RuntimeError, match=message), torch.device("meta"):
        ours.conv2d(*(t if t is None else t.to("meta") for t in change(x, w, b)), *rest)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(padding="same"), "padding='same': allowed are two whole numbers from 0"),
        (dict(stride=(1.0, 1.0)), r"stride=\(1.0, 1.0\): allowed are two whole numbers from 1"),
        (dict(stride=0), r"stride=\(0, 0\): allowed are two whole numbers from 1"),
        (dict(dilation=(1,)), r"dilation=\(1,\): allowed are two whole numbers from 1"),
        (dict(groups=1.0), "groups=1.0: allowed is a whole number"),
    ],
)
def test_numbers_that_are_none(options, message):
    """Nor do they stand in the way of those that are."""
    x, w = torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3)
    with pytest.raises(RuntimeError, match=message):
        ours.conv2d(x, w, **options)
    assert not operator._kernels


@pytest.mark.parametrize("call", [ours.conv2d, torch.ops.im2win.conv2d], ids=["function", "op"])
def test_derivatives_in_forward_mode_are_pytorchs(call):
    *tensors, stride, padding, dilation, groups = operands(CASES["all"])
    tangents = [t.flip(-1) for t in tensors]
    rest = stride, padding, dilation, groups

    def both(make):
        for actual, expected in zip(make(call), make(F.conv2d), strict=True):
            assert_same(actual, expected)

    both(lambda f: torch.func.jvp(lambda *t: f(*t, *rest), tuple(tensors), tuple(tangents)))
    both(lambda f: torch.func.jacfwd(lambda b: f(*tensors[:2], b, *rest))(tensors[2]))
    for given in range(3):
        with forward_ad.dual_level():
            duals = [*tensors]
            duals[given] = forward_ad.make_dual(tensors[given], tangents[given])
            both(lambda f: forward_ad.unpack_dual(f(*duals, *rest)))  # noqa: B023
            both(lambda f: [f(*tensors, *rest)])
    last = tensors[0].to(memory_format=torch.channels_last)
    y, _ = torch.func.jvp(lambda x: call(x, *tensors[1:], *rest), (last,), (last,))
    assert y.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(AccuracyError, match="accuracy='nonsense': allowed for float32"):
        torch.func.jvp(lambda x: call(x, *tensors[1:], *rest, "nonsense"), (last,), (last,))


def test_autocast_and_vmap():
    x, w, b, *rest = operands(CASES["all"])
    with torch.autocast("cpu", torch.float16):
        y = ours.conv2d(x, w, b, *rest)
    assert y.dtype == torch.float16
    assert_same(y, F.conv2d(x, w, b, *rest).half())
    many = torch.stack([x, x + 1, -x])
    y = torch.vmap(lambda one: ours.conv2d(one, w, b, *rest))(many)
    assert_same(y, torch.stack([F.conv2d(one, w, b, *rest) for one in many]))
    y = torch.vmap(lambda one: ours.conv2d(one, w, b, *rest), in_dims=4)(many.movedim(0, 4))
    assert_same(y, torch.stack([F.conv2d(one, w, b, *rest) for one in many]))
    doubles = [t.double() for t in (x, w, b)]
    with torch.autocast("cpu", torch.float16), pytest.warns(ours.FallbackWarning):
        assert ours.conv2d(*doubles, *rest).dtype == torch.float64
    with pytest.raises(AccuracyError, match="accuracy='tf23': allowed for float32"):
        ours.conv2d(x, w, b, *rest, accuracy="tf23")
    with pytest.raises(RuntimeError, match="vmap over weight or bias: allowed is vmap ov"):
        torch.vmap(lambda one: ours.conv2d(x, one, b, *rest))(torch.stack([w, w]))


def test_constant_weights_are_prepared_again_when_pytorch_counts_a_change():
    x, w, b, *rest = operands(CASES["all"])

    def both(w):
        actual = ours.conv2d(x, w, b, *rest, constant_weight=True)
        assert_same(actual, F.conv2d(x, w, b, *rest))

    both(w)
    held = len(operator._PREPARED._held)
    both(w)
    assert len(operator._PREPARED._held) == held
    with torch.no_grad():
        w.mul_(2)
    both(w)
    # Another tensor of the same memory, which has not counted the changes.
    memory = np.ones((6, 4, 3, 3), "float32")
    for factor in (1, 3):
        memory *= factor
        actual = ours.conv2d(x, torch.from_numpy(memory), b, *rest, constant_weight=True)
        assert_same(actual, F.conv2d(x, torch.from_numpy(memory), b, *rest))
    w.data.mul_(2)  # as documented: not seen
    actual = ours.conv2d(x, w, b, *rest, constant_weight=True)
    assert not torch.equal(actual, F.conv2d(x, w, b, *rest))
    key = next(k for k in operator._PREPARED._held if k[1] == w.untyped_storage()._cdata)
    other = torch.ones(6, 4, 3, 3)
    del w
    ours.conv2d(x, other, b, *rest, constant_weight=True)
    assert key not in operator._PREPARED._held


@pytest.mark.parametrize("cast", [False, True], ids=["plain", "autocast"])
def test_what_graphs_read_stays_as_long_as_the_weights(cast, monkeypatch):
    """As seen without a device: a graph reads the memory that it was captured with."""
    x, w, b, *rest = operands(CASES["all"])
    prepare, made = operator.Kernel.prepare, []

    def noted(kernel, weight):
        prepared = prepare(kernel, weight)
        made.append((weakref.ref(prepared.packed), prepared.packed.clone()))
        return prepared

    def call(weight, capturing=False):
        with monkeypatch.context() as patch, torch.autocast("cpu", torch.float16, enabled=cast):
            patch.setattr(weights, "_capturing", lambda _: capturing)
            y = ours.conv2d(x, weight, b, *rest, constant_weight=True)
        assert_same(y, F.conv2d(x, weight, b, *rest).to(y.dtype))

    monkeypatch.setattr(operator.Kernel, "prepare", noted)
    call(w)
    call(w, capturing=True)
    w += 1
    call(w, capturing=True)  # the graph prepares these itself, at every replay
    assert len(made) == 2 and made[1][0]() is None
    call(w)
    w += 1
    call(w)
    assert len(made) == 4
    captured, replaced = made[0], made[2]
    assert torch.equal(captured[0](), captured[1])
    assert replaced[0]() is None, "nothing else is kept"
    del w
    for _ in range(1 + cast):  # those of a cast go after the cast
        call(torch.ones(6, 4, 3, 3))
    assert captured[0]() is None


def test_what_no_kernel_takes_is_pytorchs_and_told_once():
    x, w, b, *rest = operands(CASES["plain"], torch.float64)
    with pytest.warns(ours.FallbackWarning, match=r"PyTorch computes .*float64 on cpu: dtype="):
        y = ours.conv2d(x, w, b, *rest)
    assert_same(y, F.conv2d(x, w, b, *rest))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.conv2d(x, w, b, *rest)


@pytest.mark.parametrize(("accuracy", "kept"), [(None, True), ("tf32", True), ("strict", False)])
def test_pytorch_keeps_the_class_that_was_asked_for(accuracy, kept, monkeypatch):
    """Where it takes over, on CUDA: cuDNN's TF32 is on unless somebody turns it off."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with operator._classes(accuracy):
        assert torch.backends.cudnn.allow_tf32 == kept
    assert torch.backends.cudnn.allow_tf32


def test_a_toolchain_that_fails_costs_the_speed_alone(monkeypatch):
    def fails(*_, **__):
        raise OSError("no compiler today")

    monkeypatch.setattr("im2win_tvm.compiler.compile", fails)
    x, w, b, *rest = operands(CASES["plain"])
    with pytest.warns(ours.FallbackWarning, match="no compiler today"):
        assert_same(ours.conv2d(x, w, b, *rest), F.conv2d(x, w, b, *rest))
