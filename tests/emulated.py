"""What tests ask of CUDA schedules on a machine without a GPU: emulated against the reference."""

import random

import numpy as np
from simt_switches import TARGET

import im2win_tvm.parsing  # noqa: F401
from im2win_tvm import emulate, reference, tensors
from im2win_tvm.epilogue import NONE, Epilogue
from im2win_tvm.schedules import SCHEDULES


def assert_right(form, problem, config=None, epilogue=NONE, kinds=tensors.KINDS, target=TARGET):
    schedule = SCHEDULES[form]
    config = config or schedule.default(problem, target)
    run = emulate.built(schedule, problem, config, target, epilogue)
    for kind in kinds:
        made = tensors.fill(problem, kind, 2, epilogue.bias, epilogue.residual)
        given = {name: array for name, array in made._asdict().items() if array is not None}
        actual = run(given)
        expected = reference.conv2d(*made[:2], problem, *made[2:], epilogue.activation)
        result = tensors.check(actual, expected, problem, kind, schedule.accuracy(problem))
        assert result.ok, f"{config}: {result.message}"


def assert_nan_and_infinity_stay_local(form, problem, config=None, target=TARGET):
    """They reach the outputs that read them, and no others."""
    schedule = SCHEDULES[form]
    config = config or schedule.default(problem, target)
    run = emulate.built(schedule, problem, config, target, Epilogue(True, True, "relu"))
    for seed, value in enumerate((np.nan, np.inf)):
        made = tensors.fill(problem, "integer", seed, True, True)
        chance = random.Random(seed)
        for array in (made.x, made.w):
            array.reshape(-1)[chance.randrange(array.size)] = value
        expected = reference.conv2d(
            made.x, made.w, problem, made.bias, made.residual, activation="relu"
        )
        # NumPy does not compare NaN of bfloat16
        actual = run(made._asdict()).astype("float64")
        np.testing.assert_array_equal(actual, expected)
        assert 0 < np.isfinite(actual).sum() < actual.size
