"""Relax models with our kernels, from PyTorch and ONNX, against PyTorch's outputs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax
from typer.testing import CliRunner

from im2win_tvm.cli import app
from im2win_tvm.relax import UseIm2win, build

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
nn, F = torch.nn, torch.nn.functional
ROOT = Path(__file__).parents[1]


def imported(model, *inputs, **options):
    from tvm.relax.frontend.torch import from_exported_program

    return from_exported_program(torch.export.export(model, inputs, **options))


def outputs(module, *inputs):
    machine = relax.VirtualMachine(build(module, "llvm"), tvm.cpu())
    out = machine["main"](*(tvm.runtime.tensor(x.numpy()) for x in inputs))
    return (out if hasattr(out, "numpy") else out[0]).numpy()


def operators(module):
    """Names of the operators that are left in the functions of a module."""
    found = []

    def visit(expr):
        if isinstance(expr, relax.Call) and hasattr(expr.op, "name"):
            found.append(expr.op.name)

    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return found


def assert_replaced(model, *inputs, layout="NHWC", expected=None):
    """Every convolution is ours, with what `expected` says of each, and the outputs are right."""
    torch.manual_seed(2)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    rewrite = UseIm2win("llvm", layout=layout)
    module = rewrite(imported(model, *inputs))
    assert rewrite.report.replaced == rewrite.report.layers, str(rewrite.report)
    if expected is not None:
        assert ["+".join(layer.operators) for layer in rewrite.report.layers] == expected
    assert "relax.nn.conv2d" not in operators(module)
    with torch.no_grad():
        wanted = model(*inputs).numpy()
    np.testing.assert_allclose(outputs(module, *inputs), wanted, rtol=1e-4, atol=1e-5)
    return module


class Block(nn.Module):
    """Of a residual network: two normalised convolutions, and a shortcut that may be one."""

    def __init__(self, channels, filters, stride=1):
        super().__init__()
        self.one = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.first = nn.BatchNorm2d(filters)
        self.two = nn.Conv2d(filters, filters, 3, padding=1)
        self.second = nn.BatchNorm2d(filters)
        narrow = stride == 1 and channels == filters
        self.shortcut = nn.Identity() if narrow else nn.Conv2d(channels, filters, 1, stride)

    def forward(self, x):
        y = self.second(self.two(F.relu(self.first(self.one(x)))))
        return F.relu(y + self.shortcut(x))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 12, 7, 2, 3), nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(Block(12, 12), Block(12, 20, 2))
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        return self.head(self.blocks(self.pool(F.relu(self.stem(x)))).mean((2, 3)))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", None])
def test_residual_network(layout):
    normalised = "conv2d+subtract+divide+multiply+add"
    module = assert_replaced(
        Network(),
        torch.randn(2, 3, 33, 29),
        layout=layout,
        expected=[
            "conv2d+add+relu",
            f"{normalised}+relu",
            # The residual of the first block is there when its second convolution is.
            f"conv2d+add{normalised.removeprefix('conv2d')}+add+relu",
            f"{normalised}+relu",
            f"conv2d+add{normalised.removeprefix('conv2d')}+add+relu",
            "conv2d+add",
            *(["conv2d+add"] if layout == "NHWC" else []),  # the head, a product
        ],
    )
    # Layouts change at the borders alone.
    assert operators(module).count("relax.permute_dims") <= 3


class Chained(nn.Module):
    """A convolution, and functions of what it gives."""

    def __init__(self, follow, **options):
        super().__init__()
        self.conv, self.follow = nn.Conv2d(6, 8, 3, **options), follow

    def forward(self, x):
        return self.follow(self.conv(x), x)


SCALE = torch.linspace(-2, 3, 8)[:, None, None]
CHAINS = {
    "alone": (lambda y, _: y, "conv2d+add"),
    "constant minus": (lambda y, _: F.relu(SCALE - y), "conv2d+add+subtract+relu"),
    "scaled, shifted": (lambda y, _: y * SCALE + 2.5, "conv2d+add+multiply+add"),
    "one over it": (lambda y, _: 1 / (y * y + 1), "conv2d+add"),
    "divided": (lambda y, _: F.relu(y / 4.0), "conv2d+add+divide+relu"),
    "residual": (lambda y, x: F.relu(y + x[:, :1, 1:-1, 1:-1].expand(-1, 8, -1, -1)),
                 "conv2d+add+add+relu"),
    "residual, then scaled": (lambda y, x: (y + x[:, :1, 1:-1, 1:-1].expand(-1, 8, -1, -1)) * SCALE,
                              "conv2d+add+add"),
    "twice read": (lambda y, _: y + F.relu(y), "conv2d+add"),
    "added to itself": (lambda y, _: F.relu(y + y), "conv2d+add"),
    "relu, then scaled": (lambda y, _: F.relu(y) * SCALE, "conv2d+add+relu"),
    "a row added": (lambda y, _: F.relu(y + torch.arange(7.0)), "conv2d+add"),
    "clipped": (lambda y, _: F.relu6(8 * y), "conv2d+add+multiply+clip"),
    "clipped elsewhere": (lambda y, _: F.hardtanh(y, 0, 1), "conv2d+add"),
    "clipped in steps": (lambda y, _: (8 * y).maximum(torch.tensor(0.0)).minimum(torch.tensor(6.0)),
                         "conv2d+add+multiply+maximum+minimum"),
    "from below alone": (lambda y, _: F.relu(8 * y).minimum(torch.tensor(5.0)),
                         "conv2d+add+multiply+relu"),
}  # fmt: skip


@pytest.mark.parametrize(("follow", "expected"), CHAINS.values(), ids=CHAINS)
def test_what_is_computed_with_a_convolution(follow, expected):
    """And what is not, for it would change what others read."""
    assert_replaced(Chained(follow), torch.randn(2, 6, 8, 9), expected=[expected], layout="NCHW")


@pytest.mark.parametrize(
    "options",
    [
        dict(groups=2, bias=False),
        dict(dilation=(1, 2), padding=(2, 1)),
        dict(stride=(3, 2), padding="valid"),
    ],
    ids=str,
)
def test_kinds_of_convolutions(options):
    assert_replaced(Chained(lambda y, _: F.relu(y), **options), torch.randn(1, 6, 11, 9))


def test_filters_that_are_inputs():
    class Given(nn.Module):
        def forward(self, x, w):
            return F.relu(F.conv2d(x, w, padding=1))

    x, w = torch.randn(2, 4, 7, 8), torch.randn(5, 4, 3, 3)
    rewrite = UseIm2win("llvm", layout=None)
    module = rewrite(imported(Given(), x, w))
    [layer] = rewrite.report.replaced
    assert layer.operators == ["conv2d", "relu"]
    expected = Given()(x, w).numpy()
    np.testing.assert_allclose(outputs(module, x, w), expected, rtol=1e-4, atol=1e-5)


def test_what_stays_tvms_own():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv1d(3, 3, 3, padding=1), nn.ConvTranspose2d(3, 4, 2)
            self.three = nn.Conv2d(4, 5, 3)

        def forward(self, x):
            y = self.two(self.one(x.flatten(2)).view(x.shape))
            return self.three(y)

    model, x = Mixed().eval(), torch.randn(1, 3, 6, 7)
    asked = []

    def keep(problem, choice):
        asked.append((str(problem), choice.schedule.name))
        return "it was asked to"

    rewrite = UseIm2win("llvm", keep=keep)
    module = rewrite(imported(model, x))
    assert not rewrite.report.replaced
    reasons = {layer.operators[0]: layer.origin for layer in rewrite.report.layers}
    assert reasons["conv2d"] == "it was asked to"
    assert "conv1d: allowed is conv2d" in reasons["conv1d"]
    assert "conv2d_transpose: allowed is conv2d" in reasons["conv2d_transpose"]
    assert asked == [("mb1ic4ih7iw8oc5kh3kw3", "cpu_blocked")]
    assert "0 of 3 convolutions replaced" in str(rewrite.report)
    with torch.no_grad():
        expected = model(x).numpy()
    np.testing.assert_allclose(outputs(module, x), expected, rtol=1e-4, atol=1e-5)


def test_batches_of_any_size_stay_tvms_own():
    model, x = Chained(lambda y, _: F.relu(y)).eval(), torch.randn(2, 6, 8, 9)
    batch = torch.export.Dim("batch", min=1, max=64)
    module = imported(model, x, dynamic_shapes={"x": {0: batch}})
    rewrite = UseIm2win("llvm")
    module = rewrite(module)
    [layer] = rewrite.report.layers
    assert layer.schedule is None and "allowed are numbers" in layer.origin
    for n in (1, 3):
        x = torch.randn(n, 6, 8, 9)
        with torch.no_grad():
            expected = model(x).numpy()
        np.testing.assert_allclose(outputs(module, x), expected, rtol=1e-4, atol=1e-5)


def test_normalisation_by_the_batch_stays_so():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train(), torch.randn(4, 3, 8, 8)
    module = imported(model, x)
    rewrite = UseIm2win("llvm")
    rewritten = rewrite(module)
    assert len(rewrite.report.replaced) == 1

    def all_outputs(module):
        out = relax.VirtualMachine(build(module, "llvm"), tvm.cpu())["main"](
            tvm.runtime.tensor(x.numpy())
        )
        return [each.numpy() for each in out]

    for actual, wanted in zip(all_outputs(rewritten), all_outputs(module), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


def test_filters_of_symbolic_shape_stay_tvms_own():
    builder, n = relax.BlockBuilder(), tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((1, 3, 8, 8), "float32"))
    w = relax.Var("w", relax.TensorType((n, 3, 3, 3), "float32"))
    with builder.function("main", [x, w]):
        with builder.dataflow():
            y = builder.emit(relax.op.nn.conv2d(x, w))
            one = relax.const(np.ones((1, 1, 1, 1), "float32"))
            y = builder.emit_output(relax.op.add(y, one))
        builder.emit_func_output(y)
    rewrite = UseIm2win("llvm", layout=None)
    rewrite(builder.get())
    [layer] = rewrite.report.layers
    assert layer.schedule is None and "allowed are numbers" in layer.origin


def test_layout_is_checked():
    with pytest.raises(ValueError, match="layout='HWC': allowed are 'NHWC', 'NCHW' and None"):
        UseIm2win("llvm", layout="HWC")


def test_exported_and_run_in_another_process(tmp_path):
    model, x = Network().eval(), torch.randn(1, 3, 33, 29)
    executable = build(UseIm2win("llvm")(imported(model, x)), "llvm")
    executable.export_library(str(tmp_path / "network.so"))
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import sys, numpy as np, tvm\n"
        "library = tvm.runtime.load_module(sys.argv[1] + '/network.so')\n"
        "machine = tvm.relax.VirtualMachine(library, tvm.cpu())\n"
        "x = tvm.runtime.tensor(np.load(sys.argv[1] + '/x.npy'))\n"
        "np.save(sys.argv[1] + '/y.npy', machine['main'](x)[0].numpy())\n"
        "assert not any(name.startswith('im2win') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)
    with torch.no_grad():
        expected = model(x).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-4, atol=1e-5)


def test_cuda_functions_are_built_without_a_gpu(tmp_path):
    """Both languages of tensor functions, in one module."""
    from im2win_tvm.target import CudaTarget

    target = CudaTarget("sm_90a")
    rewrite = UseIm2win(target, accuracy="tf32")
    model = Chained(lambda y, _: F.max_pool2d(F.relu(y), 2)).eval()
    module = rewrite(imported(model, torch.randn(2, 6, 8, 9)))
    [layer] = rewrite.report.replaced
    assert layer.schedule == "cuda_thin_tf32"
    assert build(module, target) is not None


class Disguised(nn.Module):
    """Products along channels with a residual as in ConvNeXt, and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.register_buffer("scale", torch.linspace(1, 2, 10)[:, None, None])
        self.wide, self.narrow = nn.Linear(12, 20), nn.Linear(20, 12)
        self.up, self.last = nn.ConvTranspose2d(12, 10, (2, 3), (2, 3)), nn.Conv2d(20, 5, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.depthwise(x).permute(0, 2, 3, 1)
        x = x + self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)
        y = self.up(x)
        return self.last(torch.cat([y, F.relu(y) * self.scale], 1))


def test_convolutions_in_disguise():
    """Layouts change where the model begins and ends, and for the patches of the transposed one."""
    expected = ["conv2d+add", "conv2d+add", "conv2d+add+gelu", "conv2d+add+add", "conv2d"]
    expected.append("conv2d+add")
    module = assert_replaced(Disguised(), torch.randn(2, 3, 7, 9), expected=expected)
    left = operators(module)
    assert left.count("relax.permute_dims") == 3 and left.count("relax.reshape") == 2
    assert not {"relax.matmul", "relax.nn.conv2d_transpose"} & set(left)


class Overlapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 4, 3, 2, 1)

    def forward(self, x):
        return self.up(F.relu(self.conv(x)))


def test_transposed_convolutions_that_overlap_stay():
    torch.manual_seed(2)
    model, x = Overlapping().eval(), torch.randn(2, 3, 9, 8)
    rewrite = UseIm2win("llvm")
    module = rewrite(imported(model, x))
    assert [layer.schedule is None for layer in rewrite.report.layers] == [True, False]
    with torch.no_grad():
        np.testing.assert_allclose(outputs(module, x), model(x).numpy(), rtol=1e-4, atol=1e-5)


def onnx_model():
    """One convolution with a bias and ReLU, and its expected output for an input."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(3)
    w, b = rng.standard_normal((8, 3, 3, 3), "float32"), rng.standard_normal(8, "float32")
    attributes = dict(pads=[1, 0, 2, 1], strides=[2, 1], kernel_shape=[3, 3])
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes),
            helper.make_node("Relu", ["y"], ["z"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 9, 8])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 8, 5, 7])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    x = torch.randn(1, 3, 9, 8)
    y = F.conv2d(F.pad(x, (0, 1, 1, 2)), torch.tensor(w), torch.tensor(b), stride=(2, 1))
    return model, x, F.relu(y).numpy()


def test_onnx():
    from tvm.relax.frontend.onnx import from_onnx

    model, x, expected = onnx_model()
    rewrite = UseIm2win("llvm")
    module = rewrite(from_onnx(model, keep_params_in_input=False))
    [layer] = rewrite.report.replaced
    assert layer.operators == ["conv2d", "add", "relu"]
    np.testing.assert_allclose(outputs(module, x), expected, rtol=1e-4, atol=1e-5)


def im2win(*arguments):
    command = [sys.executable, "-W", "ignore", "-m", "im2win_tvm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_models_in_files_are_exported(suffix, tmp_path):
    path, library = tmp_path / f"model.{suffix}", tmp_path / "model.so"
    if suffix == "onnx":
        model, x, expected = onnx_model()
        path.write_bytes(model.SerializeToString())
    else:
        model, x = Chained(lambda y, _: F.relu(y)).eval(), torch.randn(1, 6, 8, 9)
        torch.export.save(torch.export.export(model, (x,)), path)
        with torch.no_grad():
            expected = model(x).numpy()
    done = im2win("export", path, "-o", library, "--target", "llvm")
    assert done.returncode == 0, done.stderr
    assert "1 of 1 convolutions replaced" in done.stdout and "conv2d+add+relu" in done.stdout
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
    out = machine["main"](tvm.runtime.tensor(x.numpy()))
    out = out if hasattr(out, "numpy") else out[0]
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ((), None, "there is no such file"),
        ((), b"not a model", "cannot be imported"),
        (("--layout", "NHWC"), None, "--layout: not allowed with a model"),
    ],
)
def test_models_that_are_refused(options, text, message, tmp_path):
    path = tmp_path / "model.onnx"
    if text is not None:
        pytest.importorskip("onnx", reason="onnx is not installed")
        path.write_bytes(text)
    arguments = ["export", path, "-o", tmp_path / "model.so", "--target", "llvm", *options]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 2 and message in done.output, done.output
    assert "Traceback" not in done.output and not (tmp_path / "model.so").exists()


def test_products_with_few_rows_and_many_weights_stay():
    wide = nn.Sequential(nn.Flatten(), nn.Linear(4096, 1100), nn.Linear(1100, 7)).eval()
    for batch, expected in ((2, 1), (16, 2)):
        rewrite = UseIm2win("llvm")
        rewrite(imported(wide, torch.randn(batch, 4096)))
        assert len(rewrite.report.replaced) == expected
