"""Whole models through Relax: agreement with PyTorch, float16, batch sizes, choices, measuring."""

import json

import numpy as np
import pytest
import tvm
from tvm import relax
from typer.testing import CliRunner

from im2win_tvm.bench import models as bench_models
from im2win_tvm.cli import app
from im2win_tvm.relax import ModelError, UseIm2win, build, read, specialise, use_im2win
from im2win_tvm.relax.measured import Comparison, compare
from im2win_tvm.target import resolve

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
import models  # noqa: E402

nn, F = torch.nn, torch.nn.functional


def saved(model, path, *inputs, **options):
    torch.export.save(torch.export.export(model, inputs, **options), path)
    return path


def outputs(module, x, name="main"):
    machine = relax.VirtualMachine(build(module, "llvm"), tvm.cpu())
    out = machine[name](tvm.runtime.tensor(x.numpy()))
    return (out if hasattr(out, "numpy") else out[0]).numpy()


def assert_agrees(name, width, side, dtype, folder):
    """With PyTorch in float32: to 1e-4 of the largest output, or in float16 the same five best."""
    model, x = models.model(name, width), models.photograph(side)
    with torch.no_grad():
        expected = model(x).numpy()
    rewrite = UseIm2win("llvm")
    module = rewrite(read(saved(model, folder / "model.pt2", x), dtype))
    report = rewrite.report
    assert report.layers == report.replaced, str(report)
    assert {layer.convolution.dtype for layer in report.replaced} == {dtype}
    y = outputs(module, x)
    assert y.shape == expected.shape
    largest = np.abs(expected).max()
    if dtype == "float32":
        assert np.abs(y - expected).max() <= 1e-4 * largest
        return
    assert np.abs(y - expected).max() <= 2e-2 * largest
    if y.ndim == 2 and y.shape[1] == models.CLASSES:
        assert set(np.argsort(y[0])[-5:]) == set(np.argsort(expected[0])[-5:])


@pytest.mark.slow
def test_unet(tmp_path):
    """What is concatenated, and transposed convolutions between ours."""
    assert_agrees("unet", 16, 32, "float32", tmp_path)


def test_vgg_in_float16(tmp_path):
    assert_agrees("vgg16", 8, 32, "float16", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", models.MODELS)
def test_full_size(name, dtype, tmp_path):
    assert_agrees(name, 1, models.MODELS[name][1], dtype, tmp_path)


def normalised_network():
    torch.manual_seed(4)
    model = nn.Sequential(
        models.normalised(3, 8, 3, 2), nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    nn.init.uniform_(model[0].norm.running_var, 1e5, 2e5)  # too large for float16
    nn.init.normal_(model[0].norm.weight, 300, 100)
    return model.eval()


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_programs_of_float16(dtype, tmp_path):
    """TVM's importer refuses them; their outputs are those of the weights in float16."""
    model, x = normalised_network(), torch.randn(2, 3, 16, 15).half()
    model[0].norm.running_var /= 10  # PyTorch has to hold it
    model = model.half()
    module = read(saved(model, tmp_path / "model.pt2", x), dtype)
    rewrite = UseIm2win("llvm")
    module = rewrite(module)
    wanted = dtype or "float16"
    assert [layer.convolution.dtype for layer in rewrite.report.replaced] == [wanted] * 3
    assert str(module["main"].params[0].ty.dtype) == wanted
    with torch.no_grad():
        expected = model.float()(x.float()).numpy()
    y = outputs(module, x.to(getattr(torch, wanted)))
    assert np.abs(y - expected).max() <= (1e-2 if dtype is None else 1e-4) * np.abs(expected).max()


def test_float16_holds_what_statistics_do_not(tmp_path):
    model, x = normalised_network(), torch.randn(2, 3, 16, 15)
    rewrite = UseIm2win("llvm")
    module = rewrite(read(saved(model, tmp_path / "model.pt2", x), "float16"))
    assert [layer.convolution.dtype for layer in rewrite.report.replaced] == ["float16"] * 3
    with torch.no_grad():
        expected = model(x).numpy()
    y = outputs(module, x)
    assert np.abs(y - expected).max() <= 1e-2 * np.abs(expected).max()


def dynamic(folder, x):
    model = normalised_network()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    return model, saved(model, folder / "model.pt2", x, dynamic_shapes=shapes)


def test_functions_for_batch_sizes(tmp_path):
    x = torch.randn(4, 3, 12, 11)
    model, path = dynamic(tmp_path, x)
    rewrite = UseIm2win("llvm")
    module = rewrite(specialise(read(path), [1, 4]))
    assert sorted(layer.convolution.batch for layer in rewrite.report.replaced) == [
        1,
        1,
        1,
        4,
        4,
        4,
    ]
    assert len(rewrite.report.layers) == 8  # those of any batch are TVM's
    machine = relax.VirtualMachine(build(module, "llvm"), tvm.cpu())
    for name, batch in (("main", 3), ("main_batch1", 1), ("main_batch4", 4)):
        with torch.no_grad():
            expected = model(x[:batch]).numpy()
        [y] = machine[name](tvm.runtime.tensor(x[:batch].numpy()))
        np.testing.assert_allclose(y.numpy(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(Exception, match="mismatch"):
        machine["main_batch4"](tvm.runtime.tensor(x[:3].numpy()))


def test_batch_sizes_that_are_refused(tmp_path):
    x = torch.randn(2, 3, 12, 11)
    fixed = read(saved(normalised_network(), tmp_path / "fixed.pt2", x))
    assert specialise(fixed, 2) is fixed
    with pytest.raises(ModelError, match="batches=3: the model's own is 2, and fixed"):
        specialise(fixed, 3)
    with pytest.raises(ModelError, match=r"batches=\[0\]: allowed are whole numbers from 1"):
        specialise(fixed, [0])


def test_the_faster_kernel_stays(tmp_path, monkeypatch):
    x = torch.randn(2, 3, 12, 11)
    model = normalised_network()
    path = saved(model, tmp_path / "model.pt2", x)
    asked = []

    def compared(problem, *_):
        asked.append(problem)
        return Comparison(10, 20) if problem.in_channels == 3 else Comparison(20, 10)

    monkeypatch.setattr(use_im2win, "compare", compared)
    rewrite = UseIm2win("llvm", choice="measured")
    module = rewrite(read(path))
    first, second, head = rewrite.report.layers
    assert head.problem.startswith("mb2ic8ih1oc5kh1 ")
    assert first.schedule and "measured: 10.0 us, TVM's own 20.0" in first.origin
    assert second.schedule is None and "20.0 us, TVM's own 10.0; TVM's" in second.origin
    assert len(asked) == 3
    with torch.no_grad():
        expected = model(x).numpy()
    np.testing.assert_allclose(outputs(module, x), expected, rtol=1e-4, atol=1e-4)
    measured = compare(asked[0], resolve("llvm"), UseIm2win("llvm", layout=None))
    assert measured.ours_us > 0 and measured.tvm_us > 0
    with pytest.raises(ValueError, match="choice='fast': allowed are 'all', 'measured'"):
        UseIm2win("llvm", choice="fast")


def test_constants_of_three_axes_are_folded_channels_last(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.register_buffer("scale", torch.linspace(-2, 3, 8)[:, None, None])

        def forward(self, x):
            return F.relu(self.conv(x) * self.scale + 0.5)

    model, x = Scaled().eval(), torch.randn(2, 3, 9, 8)
    rewrite = UseIm2win("llvm")
    module = rewrite(read(saved(model, tmp_path / "model.pt2", x)))
    [layer] = rewrite.report.replaced
    assert layer.operators == ["conv2d", "add", "multiply", "add", "relu"]
    with torch.no_grad():
        expected = model(x).numpy()
    np.testing.assert_allclose(outputs(module, x), expected, rtol=1e-4, atol=1e-5)


def convolution(builder, x, w):
    return builder.emit(relax.op.nn.conv2d(x, relax.const(w)))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_outside_dataflow_blocks_and_in_branches(layout):
    """The one becomes ours, of the other it is told that it does not."""
    rng = np.random.default_rng(0)
    one, two = (rng.standard_normal((3, 3, 1, 1)).astype("float32") for _ in range(2))
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 3, 5, 4), "float32"))
    flag = relax.Var("flag", relax.TensorType((), "bool"))
    with builder.function("main", [x, flag]):
        y = convolution(builder, x, one)
        branch = relax.op.nn.conv2d(y, relax.const(two))
        z = builder.emit(relax.If(flag, branch, y))
        builder.emit_func_output(z)
    rewrite = UseIm2win("llvm", layout=layout)
    rewrite(builder.get())
    [other] = [layer for layer in rewrite.report.layers if layer.schedule is None]
    assert "in a branch: allowed is outside of them" in other.origin
    assert len(rewrite.report.replaced) == 1


def test_models_are_measured(tmp_path):
    path = dynamic(tmp_path, torch.randn(2, 3, 12, 11))[1]
    record = tmp_path / "record.json"

    def bench(*options):
        arguments = ["bench", str(path), "--target", "llvm", "--against", "tvm,torch", *options]
        return CliRunner().invoke(app, arguments)

    # Compiling by PyTorch takes longer than everything else here.
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(bench_models.TORCH, "torch.compile")
        done = bench("--batch", "2", "--json", str(record), "--time-limit", "0.03")
    assert done.exit_code == 0, done.output
    assert "3 of 3 convolutions replaced" in done.output and "1x mb2ic3ih12iw11" in done.output
    made = json.loads(record.read_text())
    ways = {entry["name"]: entry for entry in made["model"]["implementations"]}
    assert ways.keys() == {"im2win", "tvm", "torch nchw", "torch nhwc"}
    assert all(0 < e["times"]["warm"]["median_us"] for e in ways.values())
    assert all(0 <= e["relative_error"] < 1e-4 for e in ways.values())
    assert [layer["count"] for layer in made["layers"]] == [1, 1, 1]
    assert "pass --batch N" in str(bench().output)
    assert "--suite: not allowed with a model" in bench("--suite", "paper").output


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, size, convolutions",
    [
        (normalised_network, (16, 15), 3),
        (lambda: models.folded(models.model("unet")), (64, 64), 23),
    ],
    ids=["small", "unet"],
)
def test_kernels_are_within_cuda_graphs(make, size, convolutions, tmp_path):
    """TVM's pass lifts their calls into the function that it captures, places of tensors too."""
    from tvm.relax.backend.cuda import pipeline

    from im2win_tvm.relax.memory import PlanMemory
    from im2win_tvm.target import CudaTarget

    target, x = CudaTarget("sm_90a"), torch.randn(2, 3, *size)
    rewrite = UseIm2win(target)
    path = saved(make(), tmp_path / "model.pt2", x)
    module = rewrite(read(path, "float16"))
    assert len(rewrite.report.replaced) == convolutions
    where = target.tvm("llvm")
    passes = pipeline.legalize_passes(where) + pipeline.dataflow_lower_passes(where)
    passes += [relax.transform.StaticPlanBlockMemory(), PlanMemory()]
    passes += [relax.transform.RewriteCUDAGraph()]
    with where, tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
        module = tvm.transform.Sequential(passes)(module)
    texts = {v.name_hint: f.script() for v, f in module.functions_items() if is_relax(f)}
    assert "run_or_capture" in texts["main"] and "im2win_conv" not in texts["main"]
    captured = texts["main_cuda_graph_capture"]
    assert captured.count("im2win_conv") == convolutions
    assert "ensure_zero_offset" in captured


def is_relax(function):
    return isinstance(function, relax.Function)
