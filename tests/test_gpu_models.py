"""Models through Relax on a CUDA device, with and without TVM's CUDA graphs, against PyTorch."""

import shutil
import subprocess
from pathlib import Path

import pytest
from on_gpu import DEVICE, torch

pytestmark = pytest.mark.gpu
pytest.importorskip("torch", reason="PyTorch is not installed")
import models  # noqa: E402


def network():
    """What has kernels of its own: thin input, ReLU6, pooling, GELU, rows, patches, a head."""
    nn = torch().nn

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = models.normalised(3, 96, 7, 2, activation=nn.ReLU6)
            self.pool = nn.MaxPool2d(3, 2, 1)
            self.residual, self.block = models.Bottleneck(96, 24, 1), models.ConvNeXtBlock(96)
            self.up, self.last = nn.ConvTranspose2d(96, 32, 2, 2), nn.Conv2d(64, 32, 3, 2, 1)
            self.end = nn.Sequential(*models.head(32))

        def forward(self, x):
            y = self.up(self.block(self.residual(self.pool(self.stem(x)))))
            return self.end(self.last(torch().cat([y.relu(), y], 1)))

    models.MODELS["network"] = (lambda width: Network(), 64)
    return models.model("network")


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float16", 1e-2)])
def test_agrees_with_pytorch(dtype, limit, cuda_graph, tmp_path):
    import tvm
    from tvm import relax

    from im2win_tvm.relax import UseIm2win, build, read

    model = models.folded(network()).to(getattr(torch(), dtype))
    x = torch().randn(3, 3, 64, 64).to(getattr(torch(), dtype))
    path = tmp_path / "model.pt2"
    torch().export.save(torch().export.export(model, (x,)), path)
    with torch().no_grad():
        expected = model.to(DEVICE).double()(x.to(DEVICE).double()).cpu()
    rewrite = UseIm2win("cuda")
    module = rewrite(read(path))
    assert rewrite.report.replaced == rewrite.report.layers, str(rewrite.report)
    text = module["main"].script()
    assert "im2win_max_pool2d" in text and "im2win_layer_norm" in text
    assert "im2win_join" in text
    assert "im2win_channels_last" in text
    assert text.count("R.permute_dims") == 2  # of the patches before ReLU, of the head
    machine = relax.VirtualMachine(build(module, "cuda", cuda_graph=cuda_graph), tvm.cuda())
    for _ in range(2):
        [y] = machine["main"](tvm.runtime.from_dlpack(x.to(DEVICE)))
        y = torch().tensor(y.numpy()).double()
        assert (y - expected).abs().max() <= limit * expected.abs().max()


def test_exported_to_a_cpp_program(tmp_path):
    """examples/model.cc, which knows nothing of Python."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here (Debian: apt-get install g++)")
    import tvm
    from tvm_ffi import libinfo

    from im2win_tvm.relax import UseIm2win, build, read

    model, x = models.folded(network()), torch().ones(3, 3, 64, 64)
    path, library, program = (tmp_path / name for name in ("model.pt2", "model.so", "model"))
    torch().export.save(torch().export.export(model, (x,)), path)
    with torch().no_grad():
        expected = model.to(DEVICE).double()(x.to(DEVICE).double())[0, 0].item()
    build(UseIm2win("cuda")(read(path)), "cuda").export_library(str(library))
    ffi = Path(libinfo.find_libtvm_ffi())
    source = Path(__file__).parents[1] / "examples" / "model.cc"
    includes = [libinfo.find_include_path(), libinfo.find_dlpack_include_path()]
    command = [compiler, "-std=c++17", source, "-o", program, "-ldl", ffi]
    command += [f"-I{folder}" for folder in includes] + [f"-Wl,-rpath,{ffi.parent}"]
    subprocess.run(command, check=True)
    runtime = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    command = [program, runtime, library, "cuda", *map(str, x.shape)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, rel=1e-3, abs=1e-5)
