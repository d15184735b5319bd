"""Every tensor expression on its own, compiled for the CPU, against the paper's formulas.

The formulas here are index loops over an input that is padded first, with random operands for
each stage, so that no stage can hide another's mistake.
"""

from itertools import product

import numpy as np
import pytest
import torch_convolution
import tvm
from problems import DTYPES, EDGES, LAYOUTS
from tvm import te

from im2win_tvm import expr, reference, tensors
from im2win_tvm.epilogue import Epilogue
from im2win_tvm.problem import ConvProblem

NAMES = (
    "even kernel, uneven padding",
    "windows wholly in padding",
    "rows and columns never read",
    "dilation of rows only",
    "dilation of columns only",
    "dilation wider than the input",
    "groups",
    "depthwise with multiplier",
    "padding before only",
    "padding after only",
    "one output",
)
PROBLEMS = {
    f"{name}-{layout}": EDGES[name].replace(layout=layout) for name in NAMES for layout in LAYOUTS
}
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


def evaluate(inputs, output, arrays):
    """`output` of the placeholders `inputs`, run unscheduled into an array of NaN."""
    function = tvm.compile(te.create_prim_func([*inputs, output]), target="llvm")
    dtype = str(output.dtype)
    result = tvm.runtime.tensor(np.full([int(e) for e in output.shape], np.nan, dtype))
    function(*map(tvm.runtime.tensor, arrays), result)
    return result.numpy()


def random(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal([int(e) for e in shape]).astype(dtype)


def padded(x, problem, rows=0, columns=0):
    """x channels first with the problem's zeros around it, and further ones after it."""
    first = np.moveaxis(x, -1, 1) if problem.channels_last else x
    (top, bottom), (left, right) = problem.padding
    return np.pad(first, ((0, 0), (0, 0), (top, bottom + rows), (left, right + columns)))


def transformed(x, problem, rows, columns):
    """I'[n][c][m][k * Hf + u] = I[n][c][m * s + u][k], in loops."""
    (hf, _), (sh, _), (dh, _) = problem.kernel_size, problem.stride, problem.dilation
    source = padded(x, problem, rows * sh + hf * dh, columns)
    result = np.full((problem.batch, problem.in_channels, rows, columns * hf), np.nan, x.dtype)
    for n, c, m, k, u in product(*map(range, (*result.shape[:3], columns, hf))):
        result[n, c, m, k * hf + u] = source[n, c, m * sh + u * dh, k]
    return result.transpose(0, 2, 3, 1) if problem.channels_last else result


def convolved(iw, fw, problem):
    """O[n][o][m][q] = sum of I'[n][c][m][(q * s + v) * Hf + u] * F'[o][c][v * Hf + u], in loops."""
    (hf, wf), (_, sw), (_, dw) = problem.kernel_size, problem.stride, problem.dilation
    channels = problem.in_channels // problem.groups
    per_group = problem.out_channels // problem.groups
    result = np.zeros((problem.batch, problem.out_channels, *problem.output_size))
    for o, c, v, u in product(*map(range, (problem.out_channels, channels, wf, hf))):
        at = o // per_group * channels + c
        for q in range(problem.output_size[1]):
            position = (q * sw + v * dw) * hf + u
            if problem.channels_last:
                values, weight = iw[:, :, position, at], fw[o, (v * hf + u) * channels + c]
            else:
                values, weight = iw[:, at, :, position], fw[o, (c * wf + v) * hf + u]
            result[:, o, :, q] += values.astype(np.float64) * float(weight)
    return result


@every_problem
@pytest.mark.parametrize("dtype", DTYPES)
def test_transform(problem, dtype):
    problem = problem.replace(dtype=dtype)
    x = te.placeholder(problem.input_shape, dtype)
    values = random(problem.input_shape, dtype)
    actual = evaluate([x], expr.transform(x, problem), [values])
    columns = expr.window_columns(problem)
    assert columns <= problem.padded_size[1]
    expected = transformed(values, problem, problem.output_size[0], columns)
    np.testing.assert_array_equal(actual, expected)


@every_problem
def test_transform_of_more_rows_and_columns_than_there_are(problem):
    height, width = problem.output_size
    x = te.placeholder(problem.input_shape, "float16")
    values = random(problem.input_shape, "float16")
    iw = expr.transform(
        x, problem.replace(dtype="float16"), rows=height + 3, outputs=width + 2, dtype="float32"
    )
    actual = evaluate([x], iw, [values])
    assert actual.dtype == np.float32
    columns = expr.window_columns(problem) + 2 * problem.stride[1]
    np.testing.assert_array_equal(
        actual, transformed(values, problem, height + 3, columns).astype(np.float32)
    )


@every_problem
def test_a_window_is_one_contiguous_run(problem):
    """Section 3: it starts at q * s * Hf and is Hf * Wf long (in NHWC times C); d = 1."""
    problem = problem.replace(dilation=(problem.dilation[0], 1))
    (hf, wf), (sh, sw), (dh, _) = problem.kernel_size, problem.stride, problem.dilation
    x = te.placeholder(problem.input_shape, "float32")
    values = random(problem.input_shape)
    iw = evaluate([x], expr.transform(x, problem), [values])
    source = padded(values, problem)
    height, width = problem.output_size
    each = problem.in_channels if problem.channels_last else 1
    start, length = sw * hf * each, hf * wf * each
    for n, m, q in product(range(problem.batch), range(height), range(width)):
        window = source[n, :, m * sh :, q * sw : q * sw + wf][:, : (hf - 1) * dh + 1 : dh]
        if problem.channels_last:
            run = iw[n, m].reshape(-1)[q * start : q * start + length]
            np.testing.assert_array_equal(run, window.transpose(2, 1, 0).reshape(-1))
            continue
        for c in range(problem.in_channels):
            run = iw[n, c, m][q * start : q * start + length]
            np.testing.assert_array_equal(run, window[c].T.reshape(-1))


def filtered(w, problem):
    """F'[o][c][v * Hf + u] = F[o][c][u][v]; in NHWC channels innermost."""
    order = (0, 3, 2, 1) if problem.channels_last else (0, 1, 3, 2)
    return w.transpose(order).reshape(problem.out_channels, -1)


@every_problem
def test_filter_window(problem):
    w = te.placeholder(problem.weight_shape, "float32")
    values = random(problem.weight_shape)
    actual = evaluate([w], expr.filter_window(w, problem), [values])
    np.testing.assert_array_equal(actual, filtered(values, problem))


ORDERS = ("window", "rows", "taps", "blocks")


def positions(problem, axes):
    """(c, v, u) -> where that tap of that channel stands on the two axes of K, by walking them."""
    (hf, wf), channels = problem.kernel_size, problem.in_channels // problem.groups
    c, v, u = range(channels), range(wf), range(hf)
    if axes.order == "taps":
        return {(i, j, k): (j * hf + k, i) for i, j, k in product(c, v, u)}
    if axes.order == "blocks":
        starts = range(0, channels, axes.inner)
        walk = product(starts, u, v)  # one outer step each
        return {
            (start + i, j, k): (outer, i)
            for outer, (start, k, j) in enumerate(walk)
            for i in range(min(axes.inner, channels - start))
        }
    if axes.order == "rows":
        nchw = ((i, j, k) for i, k, j in product(c, u, v))
        nhwc = ((i, j, k) for k, j, i in product(u, v, c))
    else:
        nchw = product(c, v, u)
        nhwc = ((i, j, k) for j, k, i in product(v, u, c))
    walk = nhwc if problem.channels_last else nchw
    return {tap: (0, inner) for inner, tap in enumerate(walk)}


def every_tap(problem):
    return product(*map(range, (problem.in_channels // problem.groups, *problem.kernel_size[::-1])))


@pytest.mark.parametrize(
    ("multiple", "order", "expected"),
    [
        (1, "window", (1, 60)),
        (8, "window", (1, 64)),
        (8, "rows", (1, 64)),
        (8, "taps", (15, 8)),
        (3, "taps", (15, 6)),
        (8, "blocks", (15, 8)),
        (3, "blocks", (30, 3)),
    ],
)
def test_k_axes(multiple, order, expected):
    problem = ConvProblem(1, 8, (9, 9), 2, (5, 3), groups=2)  # K = 4 * 5 * 3
    assert expr.k_axes(problem, multiple, order) == (*expected, order)


@every_problem
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("block", "multiple"), [(1, 1), (2, 7), (8, 16)])
def test_pack_filter(problem, block, multiple, order):
    w = te.placeholder(problem.weight_shape, "float16")
    values = random(problem.weight_shape, "float16")
    axes = expr.k_axes(problem, multiple, order)
    half = problem.replace(dtype="float16")
    actual = evaluate([w], expr.pack_filter(w, half, block, axes, dtype="float32"), [values])
    per_group = problem.out_channels // problem.groups
    blocks = -(-per_group // block)
    expected = np.zeros((problem.groups, blocks, axes.outer, axes.inner, block), np.float32)
    places = positions(problem, axes)
    assert len(set(places.values())) == problem.k
    for o, (c, v, u) in product(range(problem.out_channels), every_tap(problem)):
        g, within = divmod(o, per_group)
        outer, inner = places[c, v, u]
        expected[g, within // block, outer, inner, within % block] = values[o, c, u, v]
    np.testing.assert_array_equal(actual, expected)


def window_tensors(problem, dtype="float32", rows=None, outputs=None):
    """A placeholder of I' and random values for it."""
    x = te.placeholder(problem.input_shape, dtype)
    shape = expr.transform(x, problem, rows=rows, outputs=outputs).shape
    return te.placeholder(shape, dtype), random(shape, dtype, seed=1)


@every_problem
def test_convolution(problem):
    iw, windows = window_tensors(problem)
    fw = te.placeholder((problem.out_channels, problem.k), "float32")
    weights = random(fw.shape, seed=2)
    actual = evaluate([iw, fw], expr.convolution(iw, fw, problem), [windows, weights])
    assert actual.shape == (problem.batch, problem.out_channels, *problem.output_size)
    np.testing.assert_allclose(actual, convolved(windows, weights, problem), rtol=0, atol=2e-5)


@every_problem
def test_convolution_blocked(problem):
    height, width = problem.output_size
    rows, outputs, block = height + 1, width + 2, 4
    iw, windows = window_tensors(problem, rows=rows, outputs=outputs)
    per_group = problem.out_channels // problem.groups
    blocks = -(-per_group // block)
    packed = te.placeholder((problem.groups, blocks, 1, problem.k, block), "float32")
    weights = random(packed.shape, seed=2)
    actual = evaluate(
        [iw, packed],
        expr.convolution_blocked(iw, packed, problem, rows, outputs),
        [windows, weights],
    )
    assert actual.shape == (problem.batch, problem.groups, blocks, rows, outputs, block)
    # Every block is a filter of its own: [G * blocks * block, K], with that many outputs a group.
    wide = problem.replace(out_channels=problem.groups * blocks * block)
    plain = weights[:, :, 0].transpose(0, 1, 3, 2).reshape(wide.out_channels, problem.k)
    real = windows[:, :height] if problem.channels_last else windows[:, :, :height]
    expected = convolved(real, plain, wide)
    seen = actual[:, :, :, :height, :width].transpose(0, 1, 2, 5, 3, 4).reshape(expected.shape)
    np.testing.assert_allclose(seen, expected, rtol=0, atol=2e-5)


@every_problem
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ragged", [False, True])
def test_window(problem, ragged, order):
    """The windows of I' as columns; K and P are rounded up with zeros."""
    iw, values = window_tensors(problem)
    sizes = expr.gemm_sizes(problem)
    height, width = problem.output_size
    assert sizes == (
        problem.groups,
        problem.out_channels // problem.groups,
        problem.k,
        problem.batch * height * width,
    )
    axes, p_padded = expr.k_axes(problem, 5 if ragged else 1, order), sizes.p + 3 * ragged
    actual = evaluate([iw], expr.window(iw, problem, axes, p_padded), [values])
    (hf, _), (_, sw), (_, dw) = problem.kernel_size, problem.stride, problem.dilation
    channels = problem.in_channels // problem.groups
    places = positions(problem, axes)
    expected = np.zeros((problem.groups, axes.outer, axes.inner, p_padded), np.float32)
    for g, (c, v, u) in product(range(problem.groups), every_tap(problem)):
        for q in range(width):
            run = (q * sw + v * dw) * hf + u
            at = g * channels + c
            seen = values[:, :, run, at] if problem.channels_last else values[:, at, :, run]
            expected[(g, *places[c, v, u], slice(q, sizes.p, width))] = seen.reshape(-1)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution_gemm(dtype):
    windows = te.placeholder((3, 2, 11, 7), dtype)
    packed = te.placeholder((3, 1, 2, 11, 5), dtype)
    arrays = [random(windows.shape, dtype), random(packed.shape, dtype, seed=1)]
    actual = evaluate([windows, packed], expr.convolution_gemm(windows, packed), arrays)
    assert actual.shape == (3, 5, 7) and actual.dtype == np.float32
    left, right = (array.astype(np.float64) for array in arrays)
    expected = np.einsum("gabp,gxabi->gip", left, right)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("bias", "residual"), list(product([False, True], repeat=2)))
def test_output(layout, dtype, bias, residual, activation):
    problem = ConvProblem(2, 3, (5, 4), 6, 2, dtype=dtype, layout=layout)
    epilogue = Epilogue(bias, residual, activation)
    sums = te.placeholder((2, 6, 4, 3), "float32")
    args = expr.arguments(problem, epilogue)
    y = expr.output(sums, problem, epilogue, bias=args.bias, residual=args.residual)
    values = random(sums.shape)
    # Without bias and residual 1e5 rounds to infinity in float16, and a NaN is left as it is.
    values[0, 0, 0] = np.nan, 1e5, -1e5
    extras = [random(e.shape, dtype, seed=3 + i) for i, e in enumerate(args.extras())]
    actual = evaluate([sums, *args.extras()], y, [values, *extras])
    expected = values.transpose(0, 2, 3, 1) if problem.channels_last else values
    expected = expected.copy()
    if bias:
        vector = extras[0].astype(np.float32)
        expected += vector if problem.channels_last else vector[:, None, None]
    if residual:
        expected += extras[-1].astype(np.float32)
    if activation == "relu":
        expected = np.where(expected < 0, np.float32(0), expected)
    with np.errstate(over="ignore"):
        expected = expected.astype(dtype)
    np.testing.assert_array_equal(actual, expected)
    assert np.isnan(actual).sum() == 1


@pytest.mark.parametrize("dtype", DTYPES)
@every_problem
def test_graph(problem, dtype):
    problem = problem.replace(dtype=dtype)
    epilogue = Epilogue(True, True, "relu")
    made = tensors.fill(problem, "normal", bias=True, residual=True)
    *inputs, y = expr.graph(problem, epilogue)
    assert [tensor.op.name for tensor in (*inputs, y)] == ["x", "w", "bias", "residual", "y"]
    actual = evaluate(inputs, y, made)
    expected = reference.conv2d(made.x, made.w, problem, made.bias, made.residual, "relu")
    result = tensors.check(actual, expected, problem, "normal")
    assert result.ok, result.message
    pytest.importorskip("torch", reason="PyTorch is not installed")
    second = torch_convolution.conv2d(problem, *made, relu=True)
    np.testing.assert_allclose(expected, second, rtol=0, atol=1e-12)


def test_float16_products_are_summed_in_float32():
    """A float16 sum of ones stops at 2048; 256 * 256 is infinite in float16."""
    problem = ConvProblem(1, 4098, (1, 2), 1, 1, dtype="float16")
    *inputs, y = expr.graph(problem)
    x, w = np.ones(problem.input_shape, "float16"), np.ones(problem.weight_shape, "float16")
    w[0, :2] = 256
    x[0, :2, 0, 0], x[0, :2, 0, 1] = 0, (256, -255)
    assert evaluate(inputs, y, [x, w]).reshape(-1).tolist() == [4096, 4096 + 256]


def test_float16_products_are_not_rounded():
    """(1 + 2**-10) squared is 1 + 2**-9 + 2**-20, of which float16 keeps the first two."""
    problem = ConvProblem(1, 4, (1, 1), 1, 1, dtype="float16")
    *inputs, y = expr.graph(problem, Epilogue(bias=True))
    x = np.full(problem.input_shape, 1 + 2**-10, "float16")
    w = np.full(problem.weight_shape, 1 + 2**-10, "float16")
    bias = np.array([-4 - 2**-7], "float16")
    assert evaluate(inputs, y, [x, w, bias]).item() == 2**-18
