"""Activations in place of ReLU: in every way that schedules write their kernels."""

import numpy as np
import pytest

import im2win_tvm
from im2win_tvm import reference
from im2win_tvm.activations import instead_of_relu
from im2win_tvm.emulate import run
from im2win_tvm.epilogue import Epilogue
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES, ScheduleError
from im2win_tvm.target import CudaTarget

TARGET = CudaTarget("sm_90a")


def operands(problem):
    """Sums of which some are below 0 and some above 6; one bias is NaN."""
    rng = np.random.default_rng(5)
    shapes = {"x": problem.input_shape, "w": problem.weight_shape, "bias": problem.out_channels}
    arrays = {n: 2 * rng.standard_normal(s) for n, s in shapes.items()}
    arrays = {n: array.astype(problem.dtype) for n, array in arrays.items()}
    arrays["bias"][1] = np.nan
    return arrays


def assert_applied(activation, y, problem, arrays, tolerance):
    x, w, bias = arrays.values()
    expected = reference.conv2d(x, w, problem, bias, activation=activation)
    plain = reference.conv2d(x, w, problem, bias)
    assert 0.02 < (plain > 6).mean() and 0.02 < (plain < 0).mean()
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)
    assert np.isnan(y[..., 1]).all()


@pytest.mark.parametrize("activation", ["relu6", "gelu"])
@pytest.mark.parametrize(
    ("name", "dtype", "groups"),
    [
        ("cuda_thin", "float16", 1),
        ("cuda_depthwise", "float32", 16),
        ("cuda_simt", "float32", 1),
        ("cuda_mma", "float16", 1),
    ],
)
def test_of_cuda_schedules(name, dtype, groups, activation):
    problem = ConvProblem(
        1, groups if groups > 1 else 8, (7, 6), 16, (3, 3), 1, 1, 1, groups, dtype, "NHWC"
    )
    schedule, arrays = SCHEDULES[name], operands(problem)
    epilogue = Epilogue(bias=True, activation=activation)
    y = run(schedule, problem, schedule.default(problem, TARGET), TARGET, arrays, epilogue)
    assert_applied(activation, y, problem, arrays, 2e-3 if dtype == "float16" else 1e-5)


@pytest.mark.parametrize("activation", ["relu6", "gelu"])
def test_of_the_cpu(activation):
    problem = ConvProblem.parse("mb1ic8ih7oc16kh3ph1", layout="NHWC")
    arrays = operands(problem)
    kernel = im2win_tvm.compile(problem, "llvm", bias=True, activation=activation)
    y = kernel(arrays["x"], arrays["w"], arrays["bias"])
    assert_applied(activation, y, problem, arrays, 1e-5)


def test_a_module_without_relu_is_refused():
    problem = ConvProblem.parse("mb1ic8ih7oc16kh3ph1", layout="NHWC")
    schedule = SCHEDULES["cuda_simt"]
    module = schedule.build(problem, schedule.default(problem, TARGET), TARGET)
    with pytest.raises(ScheduleError, match="applies no ReLU"):
        instead_of_relu(module, "relu6")
