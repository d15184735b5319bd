"""Which operators of a model the functions for a GPU take, seen without one."""

import pytest
import tvm

from im2win_tvm.relax import ends, read
from im2win_tvm.relax.joining import JoinPatches
from im2win_tvm.relax.normalisation import NormaliseByRows
from im2win_tvm.relax.pooling import PoolByPixels
from im2win_tvm.relax.use_im2win import _simplified

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
import models  # noqa: E402
from test_gpu_models import network  # noqa: E402

PASSES = [PoolByPixels(), NormaliseByRows(), JoinPatches(), ends.QuickEnds()]


def text(batch, tmp_path, dtype=torch.float16):
    model, x = models.folded(network()).to(dtype), torch.randn(batch, 3, 64, 64, dtype=dtype)
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (x,)), path)
    module = _simplified(read(path), "NHWC")
    return tvm.ir.transform.Sequential(PASSES)(module)["main"].script(show_meta=False)


def test_of_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(ends, "_ENOUGH", 1)
    found = text(2, tmp_path)
    for name in ("channels_last", "max_pool2d", "layer_norm", "join", "mean"):
        assert found.count(f"call_tir(im2win_{name}, ") == 1
    for name in ("nn.max_pool2d", "nn.layer_norm", "concat", "mean"):
        assert f"R.{name}(" not in found


def test_means_of_few_channels_stay(tmp_path):
    assert "R.mean(" in text(2, tmp_path)
