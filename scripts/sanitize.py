"""Run the CUDA schedules under NVIDIA's compute-sanitizer, on small problems with ragged tails.

    python scripts/sanitize.py [--tools memcheck,racecheck,...] [--schedules cuda_window,...]

Kernels are built first; the sanitizer then watches processes that only load and run them. Needs a
CUDA device, PyTorch, nvcc and compute-sanitizer (part of the CUDA toolkit). Exits with 1 if a tool
reports an error or an output is wrong.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

import im2win_tvm
from im2win_tvm import builds, environment, reference, tensors, toolchain
from im2win_tvm.epilogue import NONE, Epilogue
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.schedules.cuda_thin_tiles import Config as ThinConfig
from im2win_tvm.schedules.cuda_window_fp32_tiles import Config as SplitConfig
from im2win_tvm.schedules.cuda_window_tiles import Config
from im2win_tvm.target import CudaTarget, resolve

FORMS = (
    "cuda_simt",
    "cuda_simt_explicit",
    "cuda_simt_async",
    "cuda_simt_async_explicit",
    "cuda_mma",
    "cuda_window",
    "cuda_window_tf32",
    "cuda_window_fp32",
    "cuda_thin",
    "cuda_thin_tf32",
    "cuda_thin_fp32",
    "cuda_depthwise",
    "cuda_depthwise_mma",
)
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FULL = Epilogue(True, True, "relu")
# Ragged in every extent; whole vectors; strides, dilation, groups; more tiles of K than stages.
CASES = (
    (ConvProblem(3, 6, (11, 13), 22, (3, 4), (2, 1), ((1, 2), (0, 1)), 1, 2), FULL),
    (ConvProblem(3, 6, (11, 13), 22, (3, 4), (2, 1), ((1, 2), (0, 1)), 1, 2, layout="NHWC"), FULL),
    (ConvProblem(2, 8, (8, 8), 16, 3, padding=1), NONE),
    (ConvProblem(2, 8, (8, 8), 16, 3, padding=1, dtype="float16", layout="NHWC"), FULL),
    (
        ConvProblem(
            3, 80, (9, 11), 76, (3, 2), (1, 2), ((0, 1), (1, 0)), (1, 2), 2, "float16", "NHWC"
        ),
        FULL,
    ),
    (ConvProblem(1, 3, (27, 31), 9, 11, 4), NONE),
    (ConvProblem(1, 13, (8, 9), 13, 3, 2, 1, (1, 2), 13), NONE),
    (ConvProblem(1, 67, (7, 5), 70, 3, padding=1, dtype="float16"), NONE),
    (ConvProblem(2, 128, (7, 7), 72, 3, padding=1), FULL),
    (ConvProblem(1, 1, (1, 1), 1, 1), NONE),
)
# Filters of one channel, for CUDA cores and, in float16, tensor cores.
DEPTHWISE = ConvProblem(2, 16, (15, 19), 16, 7, 1, 3, groups=16, dtype="float16", layout="NHWC")
CASES += tuple(
    (DEPTHWISE.replace(**fields), FULL)
    for fields in ({}, {"layout": "NCHW"}, {"dtype": "float32"}, {"stride": 2})
)
# Few channels: windows one above the other, a second copy of odd strides, elements that threads
# bring because of dilation or the layout.
THIN = ConvProblem(3, 3, (21, 23), 40, 3, 2, 1, dtype="float16", layout="NHWC")
CASES += tuple(
    (THIN.replace(dtype=dtype, **fields), FULL)
    for dtype in ("float16", "float32")
    for fields in (
        {},
        {"stride": 1},
        {"dilation": 2},
        {"layout": "NCHW"},
        {"in_channels": 4, "kernel_size": 7, "padding": 3},
    )
)
# Configurations that their schedules would not choose for problems so small, by their type.
WINDOW = ConvProblem(9, 72, (9, 10), 136, 3, 1, 1, dtype="float16", layout="NHWC")
STRIDED = WINDOW.replace(in_channels=40, kernel_size=(4, 3), stride=(2, 3), dilation=(1, 2))
CONFIGURED = tuple(
    (problem.replace(dtype=dtype), FULL, config)
    for (problem, config), dtype in itertools.product(
        (
            (WINDOW.replace(in_channels=64), Config(1, 3, 8, turns=True, filter_stages=0)),
            (WINDOW.replace(layout="NCHW"), Config(1, 3, 8, turns=True, taps="row")),
            (WINDOW, Config(1, 3, 8, along_m=2, along_p=2, pixel_stages=3)),
            (WINDOW, Config(1, 3, 8, taps="row", split=4)),
            (WINDOW.replace(in_channels=200), Config(8, 1, 5, True, taps="tap", split=8)),
            (
                STRIDED,
                Config(8, 1, 2, True, taps="row", dense=True, blocks=2, filter_stages=3),
            ),
            (STRIDED, Config(2, 2, 8, dense=True)),
            (WINDOW, SplitConfig(1, 3, 8, along_p=2)),
            (WINDOW, SplitConfig(1, 3, 8, block="pixel")),
            (WINDOW, SplitConfig(1, 3, 8, taps="row", split=2)),
            (
                THIN,
                ThinConfig(
                    40, 3, 3, 1, 19, 2, producers=2, turns=True, pairs=True, by_copies=False
                ),
            ),
        ),
        ("float16", "float32"),
    )
)
OF = {
    Config: ("cuda_window", "cuda_window_tf32"),
    SplitConfig: ("cuda_window_fp32",),
    ThinConfig: ("cuda_thin", "cuda_thin_tf32"),
}


class Few(CudaTarget):
    """A GPU of two multiprocessors: a block takes many tiles, and rings of stages go round."""

    multiprocessors = 2


def prepare(folder: Path, forms: list[str]) -> dict[str, int]:
    """Export every case in the forms that take it, with operands and the expected output.

    How many kernels that are of each form.
    """
    here = resolve("cuda")
    target = Few(here.arch, here.device)
    asked = [
        (form, *case)
        for form in forms
        for case in (*((*case, None) for case in CASES), *CONFIGURED)
        if SCHEDULES[form].supports(case[0], target) is None
        and (case[2] is None or form in OF[type(case[2])])
    ]
    requests = [
        builds.Request(p, target, form, config, e, SCHEDULES[form].accuracy(p))
        for form, p, e, config in asked
    ]
    kernels = builds.build_all(requests, builds.default_jobs(target))
    for number, ((_, problem, epilogue, _), kernel) in enumerate(zip(asked, kernels, strict=True)):
        if isinstance(kernel, Exception):
            raise kernel
        kernel.export(folder / f"{number}.so")
        made = tensors.fill(problem, "integer", number, epilogue.bias, epilogue.residual)
        y = reference.conv2d(*made[:2], problem, *made[2:], epilogue.activation)
        given = {name: array for name, array in made._asdict().items() if array is not None}
        np.savez(folder / f"{number}.npz", y=y, **given)
    return dict(Counter(form for form, *_ in asked))


def run(folder: Path) -> int:
    """Run what `prepare` left; the number of wrong outputs. The sanitizer watches this process."""
    import torch

    wrong = 0
    for path in sorted(folder.glob("*.so"), key=lambda path: int(path.stem)):
        kernel = im2win_tvm.load(path)
        given = dict(np.load(path.with_suffix(".npz")))
        expected = given.pop("y")
        on_device = {name: torch.from_numpy(array).cuda() for name, array in given.items()}
        x, w, bias = on_device["x"], on_device["w"], on_device.get("bias")
        y = kernel(x, w, bias, residual=on_device.get("residual"))
        right = np.array_equal(y.cpu().numpy(), expected)
        wrong += not right
        schedule = kernel.metadata["schedule"]["name"]
        print(f"{'ok' if right else 'WRONG':5} {schedule:20} {kernel.problem}", flush=True)
    return wrong


def find_sanitizer() -> str:
    """compute-sanitizer on the PATH or beside nvcc."""
    beside = toolchain.find_nvcc().bin / "compute-sanitizer"
    found = shutil.which("compute-sanitizer") or shutil.which(str(beside))
    if found is None:
        sys.exit("no compute-sanitizer: install the CUDA toolkit's (cuda-sanitizer package)")
    return found


def watched(sanitizer: str, tool: str, folder: Path) -> int:
    """Exit status of a process of `run` under one tool."""
    options = ["--tool", tool, "--error-exitcode", "9"]
    # PyTorch's own kernels are not the question.
    text = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    for option in ("--kernel-name", "--kernel-regex"):
        if option in text:
            options += [option, "kernel_substring=im2win"]
            break
    # Without its cache every tensor is an allocation of its own, and memcheck sees its end.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, *options, sys.executable, __file__, "--run", str(folder)]
    return subprocess.run(command, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tools", default=",".join(TOOLS), help="default: %(default)s")
    parser.add_argument("--schedules", default=",".join(FORMS), help="default: all for CUDA")
    parser.add_argument("--record", type=Path, help="write what ran, and what failed, as JSON")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return 1 if run(options.run) else 0
    unknown = set(options.tools.split(",")) - set(TOOLS)
    if unknown:
        parser.error(f"--tools={options.tools}: allowed are {', '.join(TOOLS)}")
    forms = options.schedules.split(",")
    if unknown := set(forms) - set(FORMS):
        parser.error(f"--schedules={','.join(unknown)}: allowed are {', '.join(FORMS)}")
    sanitizer = find_sanitizer()
    failed = []
    with tempfile.TemporaryDirectory(prefix="im2win-") as folder:
        kernels = prepare(Path(folder), forms)
        for tool in options.tools.split(","):
            print(f"== {tool}", flush=True)
            if watched(sanitizer, tool, Path(folder)):
                failed.append(tool)
    print(f"failed: {', '.join(failed)}" if failed else "no errors")
    if options.record:
        figures = {
            "schedules": forms,
            "kernels": kernels,
            "problems": [str(problem) for problem, *_ in (*CASES, *CONFIGURED)],
            "tools": {t: "failed" if t in failed else "clean" for t in options.tools.split(",")},
        }
        command = ["python", *sys.argv]
        environment.write_record(
            options.record, "compute-sanitizer", command, resolve("cuda"), figures
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
