"""The float64 reference against PyTorch, ONNX's own tensors and small sums done by hand."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from im2win_tvm import reference
from im2win_tvm.problem import ConvProblem
from im2win_tvm.reference import conv2d

CASES = {
    "plain": ConvProblem(2, 3, (7, 9), 4, 3),
    "odd strides": ConvProblem(3, 5, (13, 11), 7, (3, 5), (2, 3), (1, 2)),
    "even kernel, uneven padding": ConvProblem(2, 3, (6, 7), 4, (2, 4), 1, ((0, 1), (1, 2))),
    "unread padding": ConvProblem(1, 2, (8, 8), 3, 3, 3, ((2, 1), (0, 2))),
    "dilation": ConvProblem(2, 3, (12, 14), 4, 3, (1, 2), (2, 1), (2, 3)),
    "groups": ConvProblem(2, 6, (8, 8), 9, 3, 1, 1, 1, 3),
    "depthwise": ConvProblem(2, 5, (8, 9), 5, 3, 2, 1, 1, 5),
    "depthwise with multiplier": ConvProblem(1, 4, (8, 9), 12, 3, 1, 1, 2, 4),
    "1x1 kernel with stride": ConvProblem(2, 8, (9, 7), 6, 1, 2),
    "kernel as large as the input": ConvProblem(2, 3, (5, 6), 4, (5, 6)),
    "1-D": ConvProblem(2, 4, (17,), 6, 5, 2, ((2, 1),), 2, 2),
    "3-D": ConvProblem(2, 4, (5, 6, 7), 6, (3, 2, 3), (1, 2, 1), (1, (0, 1), 2), (1, 1, 2), 2),
}


def tensors(problem, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (
        problem.input_shape,
        problem.weight_shape,
        (problem.out_channels,),
        problem.output_shape,
    )
    return [rng.standard_normal(shape) for shape in shapes]


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("name", CASES)
def test_against_torch(name, channels_last):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    problem = CASES[name]
    if channels_last:
        problem = problem.replace(layout={1: "NWC", 2: "NHWC", 3: "NDHWC"}[problem.spatial_rank])
    x, w, bias, residual = tensors(problem)
    first = np.ascontiguousarray(np.moveaxis(x, -1, 1)) if channels_last else x
    flat = [side for pair in reversed(problem.padding) for side in pair]
    convolve = getattr(torch.nn.functional, f"conv{problem.spatial_rank}d")
    expected = convolve(
        torch.nn.functional.pad(torch.from_numpy(first), flat),
        torch.from_numpy(w),
        torch.from_numpy(bias),
        stride=problem.stride,
        dilation=problem.dilation,
        groups=problem.groups,
    ).numpy()
    expected = np.moveaxis(expected, 1, -1) if channels_last else expected
    actual = conv2d(x, w, problem, bias)
    assert actual.dtype == np.float64 and actual.shape == problem.output_shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)
    actual = conv2d(x, w, problem, bias, residual, "relu")
    np.testing.assert_allclose(actual, np.maximum(expected + residual, 0), rtol=0, atol=1e-12)


def test_by_hand():
    # Windows of 1 2 3 4 with a zero on either side, weights 1 10 100.
    p = ConvProblem(1, 1, (4,), 1, 3, padding=1)
    x, w = np.array([[[1.0, 2, 3, 4]]]), np.array([[[1.0, 10, 100]]])
    assert conv2d(x, w, p).tolist() == [[[210, 321, 432, 43]]]
    p = p.replace(stride=2, dilation=2, padding=((1, 2),))
    # Of 0 1 2 3 4 0 0: places 0, 2, 4 and 2, 4, 6.
    assert conv2d(x, w, p, np.array([-421.0]), None, "relu").tolist() == [[[0, 0]]]
    assert conv2d(x, w, p, np.array([-41.0])).tolist() == [[[379, 1]]]


def test_float16_operands_are_accumulated_in_float64():
    p = ConvProblem(1, 4096, (1, 1), 1, 1)
    x = np.ones(p.input_shape, np.float16)
    assert conv2d(x, np.full(p.weight_shape, 0.5, np.float16), p).item() == 2048


def test_chunks_join(monkeypatch):
    p = CASES["odd strides"].replace(batch=5)
    x, w, bias, residual = tensors(p)
    whole = conv2d(x, w, p, bias, residual)
    monkeypatch.setattr(reference, "_CHUNK_BYTES", 1)
    np.testing.assert_allclose(conv2d(x, w, p, bias, residual), whole, rtol=0, atol=1e-13)


def test_nan_and_infinity_spread_to_the_windows_that_read_them():
    p = ConvProblem(1, 1, (6,), 1, 3)
    x = np.array([[[1.0, 2, np.nan, 4, 5, 6]]])
    out = conv2d(x, np.ones((1, 1, 3)), p)
    assert np.isnan(out[0, 0]).tolist() == [True, True, True, False]
    assert np.isnan(conv2d(x, np.ones((1, 1, 3)), p, activation="relu")[0, 0, 0])
    x[0, 0, 2] = np.inf
    assert conv2d(x, np.ones((1, 1, 3)), p)[0, 0].tolist() == [np.inf] * 3 + [15]


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (0, r"x of shape \(1,\): allowed: \(2, 3, 7, 9\)"),
        (1, r"w of shape \(1,\): allowed: \(4, 3, 3, 3\)"),
        (2, r"bias of shape \(1,\): allowed: \(4,\)"),
        (3, r"residual of shape \(1,\): allowed: \(2, 4, 5, 7\)"),
    ],
)
def test_wrong_shapes_are_refused(position, message):
    operands = tensors(CASES["plain"])
    operands[position] = np.zeros(1)
    x, w, bias, residual = operands
    with pytest.raises(ValueError, match=message):
        conv2d(x, w, CASES["plain"], bias, residual)


def test_unknown_activation_is_refused():
    x, w, *_ = tensors(CASES["plain"])
    with pytest.raises(ValueError, match="activation='silu': allowed: None, 'relu', 'relu6'"):
        conv2d(x, w, CASES["plain"], activation="silu")


def test_listed_tensors():
    folder = os.environ.get("IM2WIN_CASES")
    path = Path(folder or "", "onnx_node_conv.jsonl")
    if not folder or not path.is_file():
        pytest.skip("IM2WIN_CASES names no folder with onnx_node_conv.jsonl")
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        top, left, bottom, right = row["pad_ops"]
        p = ConvProblem(
            row["n"],
            row["c"],
            (row["h"], row["w"]),
            row["k"],
            (row["r"], row["s"]),
            row["stride"],
            ((top, bottom), (left, right)),
            row["dil"],
            row["groups"],
        )
        x, w, y = (np.array(row[key]) for key in ("x", "weight", "y"))
        np.testing.assert_array_equal(conv2d(x, w, p), y)
