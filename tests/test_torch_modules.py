"""Convolutions as PyTorch's modules and in models, against PyTorch's own."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch_operands import CASES, assert_same, forget, operands  # noqa: E402

import im2win_tvm.torch as ours  # noqa: E402
from im2win_tvm.torch import operator  # noqa: E402

nn, F = torch.nn, torch.nn.functional


@pytest.fixture(autouse=True)
def without_kernels(tmp_path, monkeypatch):
    forget(tmp_path, monkeypatch)


MODULES = {
    "plain": dict(in_channels=3, out_channels=8, kernel_size=3, padding=1),
    "same": dict(in_channels=3, out_channels=6, kernel_size=(3, 5), padding="same", bias=False),
    "valid": dict(in_channels=6, out_channels=6, kernel_size=3, padding="valid", groups=3),
}


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_module_is_as_pytorchs(options):
    torch.manual_seed(3)
    theirs, mine = nn.Conv2d(**options), ours.Conv2d(**options)
    assert mine.load_state_dict(theirs.state_dict()).missing_keys == []
    assert list(mine.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, options["in_channels"], 9, 8)
    torch.testing.assert_close(mine(x), theirs(x))
    torch.testing.assert_close(mine(x[0]), theirs(x[0]))
    frozen = ours.Conv2d.of(theirs).freeze()
    torch.testing.assert_close(frozen(x), theirs(x))
    with torch.no_grad():
        theirs.weight += 1  # shared
    torch.testing.assert_close(frozen(x), theirs(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(padding_mode="circular"), "padding_mode='circular': allowed is 'zeros'"),
        (dict(padding="same"), "one more after than before"),
    ],
)
def test_modules_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ours.Conv2d(3, 4, 2, **options)
    with pytest.raises(ValueError, match=message):
        ours.Conv2d.of(nn.Conv2d(3, 4, 2, **options))


class Model(nn.Module):
    """Convolutions of all kinds: one twice, one with two names, one never called."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.twice
        self.odd = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.unused = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.odd(self.again(self.twice(self.stem(x)))).mean((2, 3))


def test_convert_replaces_what_is_faster(monkeypatch):
    torch.manual_seed(1)
    model, x = Model().eval(), torch.randn(2, 3, 12, 10)
    expected = model(x)
    times = {"stem.0": (1e-3, 2e-3), "twice": (3e-3, 2e-3)}
    asked = iter([times["stem.0"], times["twice"]])  # the second call of it is alike
    monkeypatch.setattr("im2win_tvm.torch.conversion._times", lambda *_: next(asked))
    report = ours.convert(model, x)
    assert [(e.name, e.replaced) for e in report.modules] == [
        ("stem.0", True), ("twice", False), ("odd", False), ("unused", False),
    ]  # fmt: skip
    assert type(model.stem[0]) is ours.Conv2d and type(model.twice) is nn.Conv2d
    torch.testing.assert_close(model(x), expected)
    for text in ("1 of 4", "1000.0 us     2000.0 us  2.00x", "0.67x", "'reflect'", "did not call"):
        assert text in str(report)


def test_convert_without_inputs_and_compiled_whole():
    torch.manual_seed(1)
    model, x = Model().eval(), torch.randn(2, 3, 12, 10)
    expected = model(x)
    report = ours.convert(model, freeze=True)
    assert [e.replaced for e in report.modules] == [True, True, False, True]
    assert model.again is model.twice and type(model.twice) is ours.Conv2d
    assert not model.twice.weight.requires_grad
    for given in (x, x.to(memory_format=torch.channels_last)):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(given), expected)


def test_convert_leaves_the_model_as_it_was_otherwise():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(input=x))

    model, called = Keyword(), []
    hook = model.conv.register_forward_hook(lambda *_: called.append(1))
    mean = model.norm.running_mean.clone()
    assert len(ours.convert(model, torch.randn(2, 3, 8, 8)).modules) == 1
    ours.convert(model)
    assert type(model.conv) is ours.Conv2d and model.training and model.norm.training
    assert torch.equal(model.norm.running_mean, mean)
    hook.remove()
    called.clear()
    model(torch.randn(2, 3, 8, 8))
    assert not called
    [entry] = ours.convert(nn.Conv2d(3, 4, 3)).modules
    assert not entry.replaced and "Conv2d.of" in entry.reason


def test_convert_measures():
    model, x = nn.Sequential(nn.Conv2d(3, 5, 3)), torch.randn(1, 3, 8, 8)
    [entry] = ours.convert(model, x).modules
    assert entry.ours_us > 0 and entry.theirs_us > 0
    assert entry.replaced == (entry.ours_us < entry.theirs_us)


def test_graphs_are_of_cuda_alone():
    with pytest.raises(ValueError, match="graph=True, inputs on cpu: allowed are inputs on CUDA"):
        ours.convert(nn.Sequential(nn.Conv2d(3, 5, 3)), torch.randn(1, 3, 8, 8), graph=True)


def test_training_follows_pytorch():
    """Ten steps of a small network: the losses of both."""

    def losses(make):
        torch.manual_seed(5)
        model = nn.Sequential(
            make(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            make(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 5 * 5, 4),
        )  # fmt: skip
        x, labels = torch.randn(16, 1, 12, 12), torch.randint(0, 4, (16,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        found = []
        for _ in range(10):
            loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    mine, theirs = losses(ours.Conv2d), losses(nn.Conv2d)
    assert mine[-1] < mine[0] / 2
    np.testing.assert_allclose(mine, theirs, rtol=1e-3)


def test_frozen_weights_under_autocast_are_prepared_once(monkeypatch):
    x, w, b, *rest = operands(CASES["all"])
    prepared = []
    get = operator.Kernel.prepare
    monkeypatch.setattr(
        operator.Kernel, "prepare", lambda kernel, w: prepared.append(1) or get(kernel, w)
    )
    for _ in range(3):
        with torch.autocast("cpu", torch.float16):
            y = ours.conv2d(x, w, b, *rest, constant_weight=True)
        assert_same(y, F.conv2d(x, w, b, *rest).half())
    assert len(prepared) == 1
    w += 1
    with torch.autocast("cpu", torch.float16):
        y = ours.conv2d(x, w, b, *rest, constant_weight=True)
    assert_same(y, F.conv2d(x, w, b, *rest).half())


def test_converted_models_are_traced_by_fx():
    torch.manual_seed(1)
    model, x = Model().eval(), torch.randn(2, 3, 12, 10)
    expected = model(x)
    ours.convert(model)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


def test_modules_take_one_image_or_many():
    layer = ours.Conv2d(3, 4, 3)
    with pytest.raises(RuntimeError, match=r"shape \(3, 8\): allowed are \[N, C, H, W\] and"):
        layer(torch.randn(3, 8))
