"""The CPU schedule: values of its default and of its other configurations, on odd problems."""

import ctypes
import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch_convolution
from problems import DTYPES, LAYOUTS, edge_problems, odd_problems, problem_id

import im2win_tvm
from im2win_tvm import reference, tensors
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES, ScheduleError
from im2win_tvm.schedules.cpu_blocked import Config
from im2win_tvm.target import missing_cpu_features, resolve

SCHEDULE = SCHEDULES["cpu_blocked"]
FIRST, MORE = odd_problems(1, 45), odd_problems(2, 400)
SLOW = pytest.mark.slow
RAGGED = ConvProblem(2, 6, (9, 11), 22, (3, 2), (2, 1), ((1, 0), (2, 1)), (1, 2), 2)


def assert_right(kernel, kinds=tensors.KINDS):
    """The kernel's output, into an array of NaN, against the float64 reference."""
    problem, epilogue = kernel.problem, kernel.epilogue
    for kind in kinds:
        made = tensors.fill(problem, kind, 1, epilogue.bias, epilogue.residual)
        out = tensors.poisoned(problem.output_shape, problem.dtype)
        kernel(made.x, made.w, made.bias, residual=made.residual, out=out)
        expected = reference.conv2d(
            made.x, made.w, problem, made.bias, made.residual, epilogue.activation
        )
        result = tensors.check(out, expected, problem, kind)
        assert result.ok, f"{kernel.metadata['schedule']}: {result.message}"


@pytest.mark.parametrize(
    "problem",
    [
        *(
            # Two of an edge's four layouts and dtypes, in turn; the others are slow.
            pytest.param(problem, id=name, marks=() if number % 8 in (0, 3, 5, 6) else SLOW)
            for number, (name, problem) in enumerate(edge_problems())
        ),
        *(pytest.param(problem, id=problem_id(problem)) for problem in FIRST),
        *(
            pytest.param(problem, id=problem_id(problem), marks=pytest.mark.slow)
            for problem in MORE
        ),
    ],
)
def test_odd_problems(problem):
    assert_right(im2win_tvm.compile(problem, "llvm"))


@pytest.mark.parametrize("problem", FIRST[::9], ids=problem_id)
def test_against_torch(problem):
    """PyTorch's float64 takes the reference's place."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    made = tensors.fill(problem, "integer", 2)
    y = im2win_tvm.compile(problem, "llvm")(made.x, made.w)
    np.testing.assert_array_equal(y, torch_convolution.conv2d(problem, made.x, made.w))


SAMPLED = [
    RAGGED,
    RAGGED.replace(layout="NHWC", dtype="float16"),
    ConvProblem(3, 5, (13, 17), 37, 3, padding=1),
    ConvProblem(1, 2, (6, 41), 70, (1, 7), layout="NHWC"),
    ConvProblem(1, 11, (7, 7), 11, 3, padding=1, groups=11, dtype="float16"),
]


def sample(problem, count):
    """Configurations far apart: every one of the first and last, and random ones between."""
    every = list(SCHEDULE.configs(problem, resolve("llvm")))
    chosen = random.Random(0).sample(every, min(count, len(every)))
    return [every[0], every[-1], *chosen]


@pytest.mark.parametrize("turn", range(7))
@pytest.mark.parametrize("problem", SAMPLED, ids=problem_id)
def test_sampled_configurations(problem, turn):
    assert_right(im2win_tvm.compile(problem, "llvm", config=sample(problem, 5)[turn]))


@pytest.mark.parametrize(
    "fields",
    [
        dict(unroll=2),
        dict(unroll=7),  # divides no reduction of RAGGED
        dict(lanes=1),
        dict(lanes=2, vectors=2),
        dict(vectors=3, tile_rows=3, tile_columns=1, block_rows=3),
        dict(splits=3),
        dict(tile_rows=3, tile_columns=2, block_rows=6),  # more rows than there are
        dict(tile_columns=13),  # more columns than there are
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_configurations_that_are_never_proposed(fields, layout):
    plain = Config(4, 1, 1, 3, block_rows=1, splits=1)
    config = dataclasses.replace(plain, **fields)
    assert_right(im2win_tvm.compile(RAGGED.replace(layout=layout), "llvm", config=config))


def test_every_proposal_is_valid_and_the_default_is_one_of_them():
    targets = [resolve("llvm", arch=a) for a in ("x86-64", "x86-64-v3", "x86-64-v4")]
    for problem, target in itertools.product((*SAMPLED, *FIRST[:12]), targets):
        proposed = list(SCHEDULE.configs(problem, target))
        assert proposed and len(set(proposed)) == len(proposed)
        for config in proposed:
            assert SCHEDULE.check(config, problem, target) is None, config
        assert SCHEDULE.default(problem, target) in proposed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(lanes=0), "lanes=0: allowed are whole numbers from 1"),
        (dict(vectors=1.0), "vectors=1.0: allowed are whole numbers from 1"),
        (dict(unroll="2"), "unroll='2': allowed are whole numbers from 1"),
        (
            dict(tile_rows=2, tile_columns=5),
            "tile_rows*tile_columns=10, vectors=2: need 23 vector registers, x86-64-v3 has 16",
        ),
        (
            dict(block_rows=3, tile_rows=2, tile_columns=1),
            "block_rows=3: a multiple of tile_rows=2",
        ),
        (dict(lanes=6), "lanes=6: a power of two up to 8 on x86-64-v3"),
        (dict(lanes=16), "lanes=16: a power of two up to 8 on x86-64-v3"),
        (dict(splits=2), "splits=2: a divisor of the 3 blocks of output channels"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused_configurations(fields, message):
    problem, target = ConvProblem(1, 3, (9, 9), 37, 3), resolve("llvm", arch="x86-64-v3")
    good = dict(lanes=8, vectors=2, tile_rows=1, tile_columns=5, block_rows=2, splits=1)
    assert SCHEDULE.check(Config(**good), problem, target) is None
    assert SCHEDULE.check(Config(**{**good, **fields}), problem, target) == message
    with pytest.raises(ScheduleError) as caught:
        im2win_tvm.compile(problem, target, schedule="cpu_blocked", config={**good, **fields})
    assert str(caught.value) == message


def test_unknown_configuration_fields_and_schedules_are_refused():
    with pytest.raises(ScheduleError, match="config: cpu_blocked has no field depth, width"):
        im2win_tvm.compile(RAGGED, "llvm", config=dict(width=1, depth=2))
    with pytest.raises(ScheduleError, match="schedule='fast': allowed are cpu_blocked"):
        im2win_tvm.compile(RAGGED, "llvm", schedule="fast")


def test_refused_problems():
    with pytest.raises(ScheduleError, match=r"input_size=\(9,\): cpu_blocked takes two spatial"):
        im2win_tvm.compile(ConvProblem(1, 3, (9,), 4, 3), "llvm")
    huge = ConvProblem(2**15, 2**8, (2**5, 2**3), 1, 1)
    with pytest.raises(ScheduleError, match=r"input_shape=.*: cpu_blocked takes below 2\*\*31"):
        im2win_tvm.compile(huge, "llvm")
    with pytest.raises(ScheduleError, match="target=llvm: cuda_simt is for cuda"):
        im2win_tvm.compile(RAGGED, "llvm", schedule="cuda_simt")


EPILOGUES = list(itertools.product([False, True], [False, True], [None, "relu"]))


@pytest.mark.parametrize(("bias", "residual", "activation"), EPILOGUES)
@pytest.mark.parametrize(("layout", "dtype"), [("NCHW", "float32"), ("NHWC", "float16")])
def test_epilogues(layout, dtype, bias, residual, activation):
    problem = RAGGED.replace(layout=layout, dtype=dtype)
    kernel = im2win_tvm.compile(
        problem, "llvm", bias=bias, residual=residual, activation=activation
    )
    assert_right(kernel)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_reach_the_outputs_that_read_them_and_no_others(layout, dtype):
    """Values that are not finite would leak through tiles that are rounded up with zeros."""
    problem = RAGGED.replace(layout=layout, dtype=dtype)
    kernel = im2win_tvm.compile(problem, "llvm", bias=True, residual=True, activation="relu")
    clean = tensors.fill(problem, "integer", 3, bias=True, residual=True)
    chance = random.Random(5)
    for value, name in itertools.product((np.nan, np.inf, -np.inf), clean._fields):
        made = type(clean)(*(array.copy() for array in clean))
        flat = getattr(made, name).reshape(-1)
        flat[chance.randrange(flat.size)] = value
        expected = reference.conv2d(made.x, made.w, problem, made.bias, made.residual, "relu")
        out = tensors.poisoned(problem.output_shape, dtype)
        kernel(made.x, made.w, made.bias, residual=made.residual, out=out)
        np.testing.assert_array_equal(out, expected)
        if np.isnan(value):
            assert 0 < np.isnan(out).sum() < out.size
    made = type(clean)(*(array.copy() for array in clean))
    made.x[0], made.x[1] = np.inf, -np.inf
    expected = reference.conv2d(made.x, made.w, problem, made.bias, made.residual, "relu")
    assert np.isnan(expected).any() and np.isposinf(expected).any() and (expected == 0).any()
    np.testing.assert_array_equal(
        kernel(made.x, made.w, made.bias, residual=made.residual), expected
    )


@pytest.mark.parametrize("problem", SAMPLED, ids=problem_id)
def test_runs_are_equal_to_the_bit_whatever_the_threads(problem):
    kernel = im2win_tvm.compile(problem, "llvm")
    made = tensors.fill(problem, "normal", 4)
    first = kernel(made.x, made.w)
    openmp = ctypes.CDLL("libgomp.so.1")
    before = openmp.omp_get_max_threads()
    try:
        for threads in (1, 2, 3, 7):
            openmp.omp_set_num_threads(threads)
            for _ in range(5):
                out = tensors.poisoned(problem.output_shape, problem.dtype)
                assert kernel(made.x, made.w, out=out).tobytes() == first.tobytes()
    finally:
        openmp.omp_set_num_threads(before)


@pytest.mark.parametrize("arch", ["x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("problem", SAMPLED, ids=problem_id)
def test_other_processors(problem, arch):
    target = resolve("llvm", arch=arch, threads=3)
    if target.machine != "x86_64" or missing_cpu_features(target.features):
        pytest.skip(f"this processor does not run {arch} code")
    kernel = im2win_tvm.compile(problem, target)
    assert kernel.metadata["target"]["cpu"] == arch
    assert_right(kernel)


def test_what_a_processor_offers():
    found = {a: resolve("llvm", arch=a) for a in ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4")}
    assert [(t.lanes, t.registers) for t in found.values()] == [(4, 16), (4, 16), (8, 16), (16, 32)]
    assert "fma" in found["x86-64-v3"].features and "avx" not in found["x86-64-v2"].features
