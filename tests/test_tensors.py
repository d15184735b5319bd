"""How operands are made and results judged."""

import numpy as np
import pytest

from im2win_tvm import tensors
from im2win_tvm.problem import ConvProblem
from im2win_tvm.reference import conv2d
from im2win_tvm.tensors import check, fill, poisoned

PROBLEM = ConvProblem(2, 16, (9, 11), 8, 3, padding=1)
DTYPES = ("float32", "float16", "bfloat16")


def solved(problem, kind, **arguments):
    made = fill(problem, kind, **arguments)
    return made, conv2d(made.x, made.w, problem, made.bias, made.residual)


@pytest.mark.parametrize("kind", tensors.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_dtypes_and_order(dtype, kind):
    p = PROBLEM.replace(dtype=dtype, layout="NHWC")
    made = fill(p, kind, bias=True, residual=True)
    shapes = [p.input_shape, p.weight_shape, (8,), p.output_shape]
    assert [array.shape for array in made] == shapes
    assert all(array.dtype == dtype and array.flags.c_contiguous for array in made)
    assert fill(p, kind).bias is None and fill(p, kind).residual is None


@pytest.mark.parametrize("kind", tensors.KINDS)
def test_equal_values_in_every_layout_and_by_seed(kind):
    first = fill(PROBLEM, kind, seed=3, residual=True)
    last = fill(PROBLEM.replace(layout="NHWC"), kind, seed=3, bias=True, residual=True)
    np.testing.assert_array_equal(first.x, last.x.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(first.w, last.w)
    np.testing.assert_array_equal(first.residual, last.residual.transpose(0, 3, 1, 2))
    assert (fill(PROBLEM, kind, seed=4).x != first.x).any()


def test_normal_outputs_are_of_unit_scale():
    _, expected = solved(ConvProblem(2, 256, (12, 12), 32, 3), "normal")
    assert expected.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "problem",
    [
        PROBLEM,
        ConvProblem(1, 512, (5, 5), 16, 3),
        ConvProblem(1, 1, (2,), 1, 2),
        ConvProblem(4, 32, (9, 9), 32, 3, groups=32),
    ],
    ids=str,
)
def test_integer_sums_are_exact_whatever_the_signs(problem, dtype):
    p = problem.replace(dtype=dtype)
    made = fill(p, "integer", bias=True, residual=True)
    positive = [np.abs(array) for array in made]
    largest = conv2d(positive[0], positive[1], p, positive[2], positive[3]).max()
    assert largest <= {"float32": 2**24, "float16": 2**11, "bfloat16": 2**8}[dtype]
    expected = conv2d(made.x, made.w, p, made.bias, made.residual)
    assert (expected == expected.astype(dtype)).all()
    assert (made.x != 0).all()
    assert conv2d(made.x, made.w, p).any()


def test_thinned_weights_reach_every_tap():
    p = ConvProblem(1, 512, (5, 5), 128, 3, dtype="float16")
    w = fill(p, "integer").w
    assert (np.count_nonzero(w.reshape(128, -1), axis=1) == 508).all()
    assert (w != 0).any(axis=0).all()


def test_few_outputs_never_cancel():
    p = ConvProblem(1, 2, (1, 1), 1, 1)
    for seed in range(50):
        assert solved(p, "integer", seed=seed)[1].item() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_poisoned(dtype):
    array = poisoned((2, 3), dtype)
    assert array.dtype == dtype and np.isnan(array).all()


@pytest.mark.parametrize("kind", tensors.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_check_accepts_the_rounded_reference(dtype, kind):
    p = PROBLEM.replace(dtype=dtype)
    _, expected = solved(p, kind, bias=True, residual=True)
    result = check(expected.astype(dtype), expected, p, kind)
    assert result.ok, result.message
    assert result.max_error == np.abs(expected.astype(dtype) - expected).max()


def matrix_product(p, x, w, dtype=np.float32):
    """A 1x1 convolution with one product after the other added in float32."""
    left = x.astype(dtype).reshape(p.batch, p.in_channels, -1)
    total = np.zeros((p.batch, p.out_channels, left.shape[-1]), np.float32)
    for channel in range(p.in_channels):
        total += (
            left[:, None, channel]
            * w.astype(dtype).reshape(1, p.out_channels, -1, 1)[:, :, channel]
        )
    return total.reshape(p.output_shape)


@pytest.mark.parametrize("k", [1, 3, 27, 576, 4608])
def test_check_tells_float32_sums_from_lesser_ones(k):
    p = ConvProblem(2, k, (16, 16), 16, 1)
    made, expected = solved(p, "normal")
    result = check(matrix_product(p, made.x, made.w), expected, p, "normal")
    assert result.ok, result.message
    # TF32 keeps 10 bits of the fraction.
    rounded = [
        ((array.view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)
        for array in (made.x, made.w)
    ]
    assert not check(matrix_product(p, *rounded), expected, p, "normal").ok
    # As that they pass, rounded or cut off; operands of bfloat16 do not, and float32's do.
    cut = [(array.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for array in made[:2]]
    for operands in (rounded, cut, (made.x, made.w)):
        result = check(matrix_product(p, *operands), expected, p, "normal", "tf32")
        assert result.ok, result.message
    coarse = [array.astype("bfloat16").astype(np.float32) for array in (made.x, made.w)]
    assert not check(matrix_product(p, *coarse), expected, p, "normal", "tf32").ok
    half = p.replace(dtype="float16")
    made, expected = solved(half, "normal")
    result = check(matrix_product(p, made.x, made.w).astype("float16"), expected, half, "normal")
    assert result.ok, result.message


def test_check_names_the_worst_element_and_counts():
    _, expected = solved(PROBLEM, "normal")
    actual = expected.astype(np.float32)
    actual[1, 2, 3, 4] += 0.5
    actual[0, 0, 0, 0] += 0.01
    result = check(actual, expected, PROBLEM, "normal")
    assert not result.ok
    assert result.max_error == pytest.approx(0.5, abs=1e-5)
    assert result.message == (
        f"2 of {actual.size} outputs are wrong, worst at (1, 2, 3, 4): "
        f"{actual[1, 2, 3, 4]}, expected {expected[1, 2, 3, 4]}"
    )


def test_check_of_integers_is_equality():
    _, expected = solved(PROBLEM, "integer")
    actual = expected.astype(np.float32)
    assert check(actual, expected, PROBLEM, "integer") == (
        True,
        0.0,
        "largest error 0, relative over all 0",
    )
    actual[0, 1, 2, 3] += 1
    result = check(actual, expected, PROBLEM, "integer")
    assert (result.ok, result.max_error) == (False, 1.0)
    assert "(0, 1, 2, 3)" in result.message


@pytest.mark.parametrize("kind", tensors.KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_refuses_what_is_not_finite(kind, value):
    _, expected = solved(PROBLEM, kind)
    actual = expected.astype(np.float32)
    actual[0, 1, 2, 3] = value
    result = check(actual, expected, PROBLEM, kind)
    assert (result.ok, result.max_error) == (False, np.inf)
    assert "1 of" in result.message and f"(0, 1, 2, 3): {value}" in result.message
    assert not check(poisoned(PROBLEM.output_shape, "float32"), expected, PROBLEM, kind).ok


def test_check_accepts_nan_and_infinity_where_expected():
    _, expected = solved(PROBLEM, "normal")
    expected[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    assert check(expected.astype(np.float32), expected, PROBLEM, "normal").ok
    half = PROBLEM.replace(dtype="float16")
    _, expected = solved(half, "normal")
    expected[0, 0, 0, 0] = -7e4
    with np.errstate(over="ignore"):
        assert check(expected.astype(np.float16), expected, half, "normal").ok
    actual = expected.clip(-6e4).astype(np.float16)
    assert not check(actual, expected, half, "normal").ok


def test_check_refuses_zeros():
    _, expected = solved(PROBLEM, "normal")
    zeros = np.zeros(PROBLEM.output_shape, np.float32)
    assert not check(zeros, expected, PROBLEM, "normal").ok
    # One large value hides the rest from the tolerance, not from the count.
    expected[0, 0, 0, 0] = 1e9
    zeros[0, 0, 0, 0] = 1e9
    result = check(zeros, expected, PROBLEM, "normal")
    assert not result.ok and "outputs are zero, expected 0" in result.message


def test_check_bounds_the_error_of_all_outputs_together():
    _, expected = solved(PROBLEM, "normal")
    # Inside the tolerance of every element, but all on one side: no rounding error looks so.
    shift = 3 * np.finfo(np.float32).eps * np.sqrt(PROBLEM.k)
    result = check((expected + shift).astype(np.float32), expected, PROBLEM, "normal")
    assert not result.ok and "relative error of all outputs" in result.message


def test_check_in_pieces(monkeypatch):
    _, expected = solved(PROBLEM, "normal")
    actual = expected.astype(np.float32)
    actual[1, 2, 3, 4] += 0.5
    whole = check(actual, expected, PROBLEM, "normal")
    monkeypatch.setattr(tensors, "_CHECK_CHUNK", 100)
    assert check(actual, expected, PROBLEM, "normal") == whole


def test_wrong_arguments():
    _, expected = solved(PROBLEM, "normal")
    with pytest.raises(ValueError, match="kind='ones': allowed: normal or integer"):
        fill(PROBLEM, "ones")
    with pytest.raises(ValueError, match="accuracy='tf32': allowed for float16: fp16"):
        tensors.rounding_limits(PROBLEM.replace(dtype="float16"), 1.0, "tf32")
    with pytest.raises(ValueError, match="kind='ones'"):
        check(expected, expected, PROBLEM, "ones")
    with pytest.raises(ValueError, match=r"expected64 of shape \(8, 9, 11\)"):
        check(expected, expected[0], PROBLEM, "normal")
    assert "output is float64" in check(expected, expected, PROBLEM, "normal").message
    result = check(expected[0].astype(np.float32), expected, PROBLEM, "normal")
    assert not result.ok and "of shape (8, 9, 11), not float32 of shape" in result.message


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_pytorch_and_back(dtype):
    torch = pytest.importorskip("torch")
    values = [1.0, -2.5, np.inf, -0.0, 1e-3]
    array = np.array(values).astype(dtype)
    tensor = tensors.to_torch(array)
    assert tensor.dtype == getattr(torch, dtype)
    assert tensor.double().tolist() == array.astype("float64").tolist()
    back = tensors.from_torch(tensor)
    assert back.dtype == array.dtype and back.tobytes() == array.tobytes()
