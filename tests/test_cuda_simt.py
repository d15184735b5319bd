"""The CUDA-core schedules on a machine without a GPU: values emulated, code through nvcc."""

import itertools
import random

import pytest
from emulated import assert_nan_and_infinity_stay_local, assert_right
from problems import DTYPES, LAYOUTS, odd_problems, problem_id
from simt_switches import FORMS, RAGGED, SWITCHES, TARGET, WHOLE, config_of

import im2win_tvm
from im2win_tvm.epilogue import Epilogue
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES, ScheduleError

every_form = pytest.mark.parametrize("form", FORMS)


@every_form
@pytest.mark.parametrize(
    "problem",
    [
        *odd_problems(3, 30, most_work=1_000_000),
        *(
            pytest.param(problem, marks=pytest.mark.slow)
            for problem in odd_problems(4, 240, most_work=1_000_000)
        ),
    ],
    ids=problem_id,
)
def test_odd_problems(problem, form):
    assert_right(form, problem)


def every_switch():
    """(form, layout, dtype, name): of the eight ways to run a switch every other one."""
    ways = list(itertools.product(FORMS, LAYOUTS, DTYPES))
    for number, name in enumerate(SWITCHES):
        for way, (form, layout, dtype) in enumerate(ways):
            if (way.bit_count() + number) % 2 == 0:
                yield form, layout, dtype, name


@pytest.mark.parametrize(("form", "layout", "dtype", "name"), list(every_switch()))
def test_switches(form, layout, dtype, name):
    config = config_of(**SWITCHES[name])
    for problem in (RAGGED, WHOLE):
        problem = problem.replace(dtype=dtype, layout=layout)
        if config.table:
            problem = problem.replace(padding=0)
        assert_right(form, problem, config, kinds=("integer",))


@pytest.mark.parametrize("turn", range(12))
def test_sampled_configurations(turn):
    """Proposals far apart, on a problem that none of them divides."""
    chance = random.Random(turn)
    problem = RAGGED.replace(layout=chance.choice(LAYOUTS), dtype=chance.choice(DTYPES))
    form = chance.choice(FORMS)
    config = chance.choice(list(SCHEDULES[form].configs(problem, TARGET)))
    assert_right(form, problem, config, Epilogue(True, True, "relu"))


@every_form
@pytest.mark.parametrize(
    ("bias", "residual", "activation"),
    list(itertools.product([False, True], [False, True], [None, "relu"])),
)
def test_epilogues(bias, residual, activation, form):
    epilogue = Epilogue(bias, residual, activation)
    assert_right(form, RAGGED.replace(layout="NHWC"), epilogue=epilogue)
    assert_right(form, WHOLE.replace(dtype="float16"), epilogue=epilogue)


@every_form
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_reach_the_outputs_that_read_them_and_no_others(layout, form):
    assert_nan_and_infinity_stay_local(form, RAGGED.replace(layout=layout))


def test_every_proposal_is_valid_and_so_is_the_default():
    for problem in (RAGGED, WHOLE, *odd_problems(5, 4)):
        for schedule in (SCHEDULES[form] for form in FORMS):
            proposed = list(schedule.configs(problem, TARGET))
            assert len(set(proposed)) == len(proposed) > 100
            for config in (*proposed, schedule.default(problem, TARGET)):
                assert schedule.check(config, problem, TARGET) is None, config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(block_m=0), "block_m=0: allowed are whole numbers from 1"),
        (dict(block_k=8.0), "block_k=8.0: allowed are whole numbers from 1"),
        (dict(thread_p=True), "thread_p=True: allowed are whole numbers from 1"),
        (dict(shared=1), "shared=1: allowed are True and False"),
        (dict(prefetch="no"), "prefetch='no': allowed are True and False"),
        (dict(vector=3), "vector=3: allowed are 1, 2 and 4"),
        (dict(vector=8), "vector=8: allowed are 1, 2 and 4"),
        (dict(thread_m=5), "thread_m=5: a divisor of block_m=32"),
        (dict(block_p=60, thread_p=6), "thread_p=6: a divisor or a multiple of vector=4"),
        (
            dict(block_m=8, block_p=16),
            "block_m=8, block_p=16, thread_m=4, thread_p=4: 8 threads; allowed are 32 to 1024",
        ),
        (
            dict(block_m=256, block_p=256, thread_m=4, thread_p=4),
            "block_m=256, block_p=256, thread_m=4, thread_p=4: 4096 threads; "
            "allowed are 32 to 1024",
        ),
        (
            dict(block_m=128, block_p=256, thread_m=16, thread_p=16),
            "thread_m=16, thread_p=16: more than 128 accumulators",
        ),
        (dict(shared=False), "shared=False: double_buffer, prefetch and table need shared=True"),
        (
            dict(shared=False, double_buffer=False),
            "shared=False: double_buffer, prefetch and table need shared=True",
        ),
        (
            dict(table=True),
            "table=True: padding=((1, 2), (0, 1)) is read in the kernel, windows differ",
        ),
        (dict(block_k=64), "block_k=64: 51200 bytes of shared memory, 49152 allowed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_configurations(fields, message):
    schedule = SCHEDULES["cuda_simt"]
    assert schedule.check(config_of(), RAGGED, TARGET) is None
    assert schedule.check(config_of(**fields), RAGGED, TARGET) == message
    with pytest.raises(ScheduleError) as caught:
        im2win_tvm.compile(
            RAGGED, TARGET, schedule="cuda_simt", config={**vars(config_of()), **fields}
        )
    assert str(caught.value) == message


def test_refused_problems():
    many = ConvProblem(1, 65536, (1, 1), 65536, 1, groups=65536)
    for form in FORMS:
        with pytest.raises(ScheduleError, match=f"groups=65536: {form} takes up to 65535"):
            im2win_tvm.compile(many, TARGET, schedule=form)
        with pytest.raises(ScheduleError, match=rf"input_size=\(9,\): {form} takes two spatial"):
            im2win_tvm.compile(ConvProblem(1, 3, (9,), 4, 3), TARGET, schedule=form)
    large = ConvProblem(512, 64, (200, 200), 1, 7)
    with pytest.raises(ScheduleError, match=r"I' has 2\*\*31 elements or more"):
        im2win_tvm.compile(large, TARGET, schedule="cuda_simt_explicit")
    assert SCHEDULES["cuda_simt"].supports(large, TARGET) is None
