"""PyTorch's operator on a CUDA device: streams, graphs, formats, models."""

import pytest
from on_gpu import DEVICE, torch

from im2win_tvm import kernel_cache

pytestmark = pytest.mark.gpu


@pytest.fixture
def ours(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path))
    torch()
    import im2win_tvm.torch

    return im2win_tvm.torch


def operands(memory_format, dtype="float16"):
    """Whole numbers, whose sums are exact in float32."""
    made = torch().manual_seed(1)
    dtype = getattr(torch(), dtype)
    x, w, b = (
        torch().randint(-3, 4, size, generator=made).to(DEVICE, dtype)
        for size in ((4, 64, 13, 12), (80, 64, 3, 3), (80,))
    )
    return x.to(memory_format=memory_format), w, b


@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
def test_values_on_streams_and_in_graphs(ours, memory_format):
    memory_format = getattr(torch(), memory_format)
    x, w, b = operands(memory_format)
    call = lambda: ours.conv2d(x, w, b, padding=1, constant_weight=True)  # noqa: E731
    expected = torch().nn.functional.conv2d(x.double(), w.double(), b.double(), padding=1).half()
    y = call()
    assert y.is_contiguous(memory_format=memory_format) and torch().equal(y, expected)
    stream = torch().cuda.Stream()
    stream.wait_stream(torch().cuda.current_stream())
    with torch().cuda.stream(stream):
        for _ in range(50):
            assert torch().equal(call(), expected)
    torch().cuda.current_stream().wait_stream(stream)
    graph = torch().cuda.CUDAGraph()
    with torch().cuda.graph(graph):
        y = call()
    x.mul_(-1)
    graph.replay()
    wanted = torch().nn.functional.conv2d(x.double(), w.double(), b.double(), padding=1).half()
    assert torch().equal(y, wanted)


@pytest.mark.parametrize("cast", [False, True], ids=["plain", "autocast"])
def test_graphs_keep_the_weights_that_they_were_captured_with(ours, cast):
    x, w, b = operands(torch().channels_last, "float32" if cast else "float16")

    def call():
        with torch().autocast("cuda", torch().float16, enabled=cast):
            return ours.conv2d(x, w, b, padding=1, constant_weight=True)

    def expected():
        operands = x.double(), w.double(), b.double()
        return torch().nn.functional.conv2d(*operands, padding=1).half()

    call()
    graph = torch().cuda.CUDAGraph()
    with torch().cuda.graph(graph):
        y = call()
    before = expected()
    w.add_(1)
    assert torch().equal(call(), expected())
    # Whatever the call gave back is somebody else's now.
    others = [
        torch().full((bytes_,), 255, dtype=torch().uint8, device=DEVICE)
        for bytes_ in (w.nbytes // 2, w.nbytes, 2 * w.nbytes)
        for _ in range(20)
    ]
    graph.replay()
    assert torch().equal(y, before)
    again = torch().cuda.CUDAGraph()
    with torch().cuda.graph(again):
        y = call()
    again.replay()
    assert torch().equal(y, expected())
    # Captured after a change and before a call, a graph prepares the weights itself.
    w.sub_(2)
    follows = torch().cuda.CUDAGraph()
    with torch().cuda.graph(follows):
        y = call()
    w.add_(3)
    follows.replay()
    assert torch().equal(y, expected())
    del others


def test_convert_keeps_the_outputs(ours):
    nn = torch().nn
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()
    )
    model = model.to(DEVICE).half().eval().to(memory_format=torch().channels_last)
    x = torch().randn(8, 3, 64, 64, device=DEVICE).half().to(memory_format=torch().channels_last)
    with torch().no_grad():
        expected = model(x)
        report = ours.convert(model, x, freeze=True)
        assert all(entry.ours_us > 0 for entry in report.modules)
        torch().testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)
