"""Third-party problem lists (folder in IM2WIN_CASES) through the CPU schedule: a sample of rows."""

import json
import os
from math import prod
from pathlib import Path

import numpy as np
import pytest

import im2win_tvm
from im2win_tvm import batch, reference, tensors
from im2win_tvm.problem import ConvProblem

FOLDER = os.environ.get("IM2WIN_CASES")
LISTS = (
    "tvm_topi",
    "tvm_topi_group",
    "pytorch_opinfo",
    "pytorch_operator_benchmark",
    "cutlass_conv2d",
    "onednn_networks",
)
# A float64 reference of this many multiply-adds takes some 0.2 s.
MOST_WORK = 20_000_000
ROWS = 5


def path_of(name):
    path = Path(FOLDER or "", f"{name}.jsonl")
    if not FOLDER or not path.is_file():
        pytest.skip(f"IM2WIN_CASES names no folder with {name}.jsonl")
    return path


def rows(name):
    return [json.loads(line) for line in path_of(name).read_text(encoding="utf-8").splitlines()]


def smaller(problem):
    """Batch and channels cut until a reference is quick; what the row is about stays."""
    while prod(problem.output_shape) * problem.k > MOST_WORK:
        if problem.batch > 1:
            problem = problem.replace(batch=1)
        elif problem.groups == 1 and problem.out_channels > 17:
            problem = problem.replace(out_channels=problem.out_channels // 2)
        elif problem.groups == 1 and problem.in_channels > 3:
            problem = problem.replace(in_channels=problem.in_channels // 2)
        else:
            break
    return problem


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("number", range(ROWS))
def test_sampled_rows(name, dtype, number):
    """Rows at equal distances: the first, the last and between; layouts in turn."""
    layout = ("NCHW", "NHWC")[number % 2]
    cases = list(batch.read_problems(path_of(name), dtype=dtype, layout=layout))
    # Half a step further for the second dtype, so that it sees other rows.
    place = (number + 0.5 * (dtype == "float16")) / (ROWS - 0.5)
    case = cases[round(place * (len(cases) - 1))]
    problem = smaller(case.problem)
    kernel = im2win_tvm.compile(problem, "llvm", bias=True, activation="relu")
    for kind in tensors.KINDS:
        made = tensors.fill(problem, kind, number, bias=True)
        out = tensors.poisoned(problem.output_shape, dtype)
        kernel(made.x, made.w, made.bias, out=out)
        expected = reference.conv2d(made.x, made.w, problem, made.bias, activation="relu")
        result = tensors.check(out, expected, problem, kind)
        assert result.ok, f"{case.origin} {case.name}, {problem}: {result.message}"


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_onnx_rows_bring_their_own_tensors(layout):
    listed = rows("onnx_node_conv")
    cases = list(batch.read_problems(path_of("onnx_node_conv"), layout=layout))
    assert len(listed) == len(cases) > 0
    for row, case in zip(listed, cases, strict=True):
        x, w, y = (np.array(row[key], np.float32) for key in ("x", "weight", "y"))
        if layout == "NHWC":
            x, y = (np.ascontiguousarray(a.transpose(0, 2, 3, 1)) for a in (x, y))
        out = tensors.poisoned(case.problem.output_shape, "float32")
        im2win_tvm.compile(case.problem, "llvm")(x, w, out=out)
        np.testing.assert_array_equal(out, y, err_msg=case.name)


@pytest.mark.parametrize("name", LISTS)
def test_every_row_has_a_schedule_on_both_kinds_of_target(name):
    """Chosen, not compiled: each with a configuration that its schedule calls valid."""
    from im2win_tvm.select import select
    from im2win_tvm.target import resolve

    targets = resolve("llvm", arch="x86-64-v3", threads=8), resolve("cuda", arch="sm_90")
    for case in batch.read_problems(path_of(name)):
        assert isinstance(case.problem, ConvProblem)
        for target in targets:
            choice = select(case.problem, target)
            assert choice.schedule.check(choice.config, case.problem, target) is None, case.name
