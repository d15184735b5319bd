"""What tests ask of kernels on a CUDA device, through PyTorch: their values against a reference."""

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import im2win_tvm
from im2win_tvm import builds, reference, tensors
from im2win_tvm.epilogue import NONE, Epilogue
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.target import CudaTarget, resolve

DEVICE = "cuda"


@functools.cache
def torch():
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch


class Asked(NamedTuple):
    """A kernel; config: None is the heuristic's; target: None is this device."""

    schedule: str
    problem: ConvProblem
    epilogue: Epilogue = NONE
    config: Any = None
    target: CudaTarget | None = None

    def __str__(self):
        p = self.problem
        return f"{self.schedule}-{p}-{p.layout}-{p.dtype}-{self.epilogue}-{self.config}"


def build(asked: Iterable[Asked]) -> dict:
    """The kernel, or why there is none, of all that is asked for."""
    asked, here = list(dict.fromkeys(asked)), resolve(DEVICE)
    requests = [
        builds.Request(
            each.problem,
            each.target or here,
            each.schedule,
            each.config,
            each.epilogue,
            SCHEDULES[each.schedule].accuracy(each.problem),
        )
        for each in asked
    ]
    return dict(zip(asked, builds.build_all(requests, builds.default_jobs(here)), strict=True))


def build_for(request) -> dict:
    """Those kernels that the selected tests of a module have as their parameter `asked`."""
    items = (item for item in request.session.items if item.module is request.module)
    return build(item.callspec.params["asked"] for item in items if hasattr(item, "callspec"))


def on_device(array):
    return None if array is None else tensors.to_torch(array).to(DEVICE)


def poisoned(problem):
    dtype = getattr(torch(), problem.dtype)
    return torch().full(problem.output_shape, torch().nan, dtype=dtype, device=DEVICE)


def solved(problem, epilogue=NONE, kind="integer", seed=0):
    """Operands on the device, and the reference's output."""
    made = tensors.fill(problem, kind, seed, epilogue.bias, epilogue.residual)
    expected = reference.conv2d(*made[:2], problem, *made[2:], epilogue.activation)
    return tensors.Tensors(*map(on_device, made)), expected


def run(kernel, made, w=None, out=None):
    out = poisoned(kernel.problem) if out is None else out
    weights = made.w if w is None else w
    assert kernel(made.x, weights, made.bias, residual=made.residual, out=out) is out
    return out


def assert_right(kernel, kinds=tensors.KINDS):
    for kind in kinds:
        made, expected = solved(kernel.problem, kernel.epilogue, kind, 1)
        result = tensors.check(
            tensors.from_torch(run(kernel, made)),
            expected,
            kernel.problem,
            kind,
            kernel.metadata["accuracy"],
        )
        assert result.ok, f"{kernel.metadata['schedule']}, {kind}: {result.message}"


def exact(x, w, problem):
    """The convolution in PyTorch's float64 on the device, for a few images."""
    first = x.permute(0, 3, 1, 2) if problem.channels_last else x
    (top, bottom), (left, right) = problem.padding
    y = torch().nn.functional.conv2d(
        torch().nn.functional.pad(first.double(), (left, right, top, bottom)),
        w.double(),
        stride=problem.stride,
        dilation=problem.dilation,
        groups=problem.groups,
    )
    return y.permute(0, 2, 3, 1) if problem.channels_last else y


def assert_close_to_float64(kernel):
    """Against float64 on the device in chunks of images; the largest takes some 10 GiB."""
    problem = kernel.problem
    dtype = getattr(torch(), problem.dtype)
    generator = torch().Generator(DEVICE).manual_seed(3)
    x = torch().randn(problem.input_shape, generator=generator, device=DEVICE).to(dtype)
    w = torch().randn(problem.weight_shape, generator=generator, device=DEVICE) / problem.k**0.5
    w = w.to(dtype)
    out = kernel(x, w, out=poisoned(problem))
    # Unit variance in, 1/K in the weights: the outputs' scale is 1.
    limits = tensors.rounding_limits(problem, 1.0, kernel.metadata["accuracy"])
    errors = squares = 0.0
    for start in range(0, problem.batch, 4):
        images = slice(start, start + 4)
        expected = exact(x[images], w, problem)
        error = (out[images].double() - expected).abs()
        over = error - (limits.floor + limits.share * expected.abs())
        assert over.max().item() <= 0, f"images from {start}: off by {error.max().item():.3g}"
        errors += error.square().sum().item()
        squares += expected.square().sum().item()
    assert 0 < errors**0.5 <= limits.norm * squares**0.5


# Loads argv[1], runs it on the arrays of argv[2], writes the output to argv[3].
RUN = """
import sys
import numpy as np
import torch
import im2win_tvm
kernel = im2win_tvm.load(sys.argv[1])
given = {name: torch.from_numpy(a).cuda() for name, a in np.load(sys.argv[2]).items()}
y = kernel(given["x"], given["w"], given["bias"], residual=given["residual"])
np.save(sys.argv[3], y.cpu().numpy())
assert "tvm" not in sys.modules
"""


def assert_right_in_another_process(library, made, expected, folder):
    """What was exported, loaded without TVM; with bias and residual."""
    given = {name: tensor.cpu().numpy() for name, tensor in made._asdict().items()}
    np.savez(folder / "given.npz", **given)
    sources = str(Path(im2win_tvm.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", RUN, library, folder / "given.npz", folder / "out.npy"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([sources, *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(folder / "out.npy"), expected)


@contextmanager
def load():
    """Matrix products and copies on another stream, all the time."""
    done = threading.Event()

    def work():
        stream = torch().cuda.Stream()
        with torch().cuda.stream(stream):
            a = torch().ones((2048, 2048), dtype=torch().float16, device=DEVICE)
            product = torch().empty_like(a)
            memory = torch().zeros(1 << 26, dtype=torch().uint8, device=DEVICE)
            first, second = memory.chunk(2)
            while not done.is_set():
                for _ in range(4):
                    torch().mm(a, a, out=product)
                    second.copy_(first)
                stream.synchronize()

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            yield
        finally:
            done.set()
            working.result()
