"""The asynchronous CUDA-core schedules on a machine without a GPU: simulated, and through nvcc."""

import functools
import itertools
import math
import random

import numpy as np
import pytest
from emulated import assert_nan_and_infinity_stay_local, assert_right
from problems import LAYOUTS, edge_problems, odd_problems, problem_id
from simt_switches import RAGGED, TARGET, WHOLE

import im2win_tvm
from im2win_tvm import lower, simulate, suites, toolchain
from im2win_tvm.epilogue import NONE, Epilogue
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES, ScheduleError
from im2win_tvm.schedules.cuda_simt_async_kernel import convolve
from im2win_tvm.schedules.cuda_simt_async_tiles import Config
from im2win_tvm.target import CudaTarget

FORMS = ("cuda_simt_async", "cuda_simt_async_explicit")
BASE = dict(block_m=16, block_p=32, block_k=8, thread_m=4, thread_p=4, taps=False)
# Channels in whole tiles, little else: 20 outputs a group, 80 pixels an image, 63 without padding.
TAPS = ConvProblem(2, 32, (9, 11), 40, (3, 2), (1, 1), ((0, 1), (1, 0)), (1, 2), 2)

# Tiles of all shapes, larger than the problem and smaller; whole and ragged copies.
CONFIGS = {
    "base": {},
    "two stages": dict(stages=2),
    "eight stages": dict(stages=8),
    "two warps along pixels": dict(block_p=64),
    "two warps along channels": dict(block_m=32),
    "three warps, rows of copies left over": dict(block_p=96, block_k=8),
    "pixels of a copy left over": dict(block_m=64, block_p=48, thread_m=8, thread_p=12),
    "odd number of products a tile": dict(block_k=11),
    "more warps than products a tile": dict(block_m=64, block_p=64, block_k=4),
    "8x8 outputs a thread": dict(block_m=64, block_p=64, thread_m=8, thread_p=8),
    "12x8 outputs a thread": dict(block_m=48, block_p=64, thread_m=12, thread_p=8),
    "16x8 outputs a thread": dict(block_m=64, block_p=64, thread_m=16, thread_p=8),
    "8x16 outputs a thread": dict(block_m=32, block_p=128, thread_m=8, thread_p=16),
    "split in two": dict(split=2),
    "split in three": dict(split=3, block_p=64),
    "split finely": dict(split=5, block_k=4, block_m=32),
    "K in one tile": dict(block_k=40),
}


# Whole numbers small enough that every order of summation gives the same: compared for equality.
assert_equal = functools.partial(assert_right, kinds=("integer",))


def config_of(**fields):
    return Config(**{**BASE, **fields})


def single(problems):
    """The problems in float32, which is what these schedules take, each once."""
    return list(dict.fromkeys(problem.replace(dtype="float32") for problem in problems))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "problem",
    [
        *single(odd_problems(6, 10, most_work=200_000)),
        *(
            pytest.param(problem, marks=pytest.mark.slow)
            for problem in single(
                [*(p for _, p in edge_problems()), *odd_problems(7, 200, most_work=1_000_000)]
            )
        ),
    ],
    ids=problem_id,
)
def test_odd_problems(problem, form):
    assert_equal(form, problem)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("form", "layout", "problem"),
    [
        (FORMS[0], "NCHW", RAGGED),
        (FORMS[0], "NHWC", WHOLE.replace(padding=0)),
        (FORMS[1], "NHWC", RAGGED),
        (FORMS[1], "NCHW", WHOLE),
    ],
    ids=lambda value: value if isinstance(value, str) else problem_id(value),
)
def test_configurations(form, layout, problem, name):
    assert_equal(form, problem.replace(layout=layout), config_of(**CONFIGS[name]))


@pytest.mark.parametrize(("form", "layout"), list(itertools.product(FORMS, LAYOUTS)))
@pytest.mark.parametrize("fields", [{}, dict(block_k=16, split=3), dict(block_k=4, stages=4)])
def test_taps(form, layout, fields):
    config = config_of(taps=True, **fields)
    assert_equal(form, TAPS.replace(layout=layout), config)
    assert_right(form, TAPS.replace(layout=layout, padding=0), config, kinds=("normal",))


@pytest.mark.parametrize("turn", range(8))
def test_sampled_configurations(turn):
    """Proposals far apart, on problems that none of them divides."""
    chance = random.Random(turn)
    problem = chance.choice((RAGGED, TAPS)).replace(layout=chance.choice(LAYOUTS))
    form = chance.choice(FORMS)
    config = chance.choice(list(SCHEDULES[form].configs(problem, TARGET)))
    assert_equal(form, problem, config, Epilogue(True, True, "relu"))


@pytest.mark.parametrize(
    ("bias", "residual", "activation"),
    list(itertools.product([False, True], [False, True], [None, "relu"])),
)
def test_epilogues(bias, residual, activation):
    epilogue = Epilogue(bias, residual, activation)
    for problem, form, layout, split in (
        (RAGGED, FORMS[0], "NCHW", 2),
        (RAGGED, FORMS[1], "NHWC", 1),
        (WHOLE, FORMS[0], "NHWC", 2),
        (WHOLE, FORMS[1], "NCHW", 1),
    ):
        assert_equal(form, problem.replace(layout=layout), config_of(split=split), epilogue)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("problem", [RAGGED, RAGGED.replace(padding=0), TAPS], ids=problem_id)
def test_nan_and_infinity_reach_the_outputs_that_read_them_and_no_others(problem, layout, form):
    config = config_of(taps=problem.in_channels == TAPS.in_channels, split=2)
    assert_nan_and_infinity_stay_local(form, problem.replace(layout=layout), config)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("problem", "config"),
    [
        (TAPS.replace(padding=0), Config(64, 64, 16, 8, 8, split=2)),
        (TAPS, Config(64, 144, 16, 8, 12)),
        (RAGGED, Config(64, 128, 8, 8, 8, taps=False)),
    ],
)
def test_shared_memory_has_no_bank_conflicts(problem, config, layout):
    problem = problem.replace(layout=layout)
    function = convolve(problem, config, NONE, False)
    arrays = {p.name: np.ones([int(n) for n in p.shape], "float32") for p in function.params}
    report = simulate.run(function, arrays, conflicts=True)
    assert sum(entry.wavefronts for entry in report.conflicts.values()) > 1000
    assert [s for s, entry in report.conflicts.items() if entry.extra] == []


def test_every_proposal_is_valid_and_so_is_the_default():
    for problem in (RAGGED, TAPS):
        for schedule in (SCHEDULES[form] for form in FORMS):
            proposed = list(schedule.configs(problem, TARGET))
            assert len(set(proposed)) == len(proposed) > 100
            chosen = random.Random(0).sample(proposed, 100)
            for config in (*chosen, schedule.default(problem, TARGET)):
                assert schedule.check(config, problem, TARGET) is None, config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(block_m=0), "block_m=0: allowed are whole numbers from 1"),
        (dict(split=2.0), "split=2.0: allowed are whole numbers from 1"),
        (dict(stages=True), "stages=True: allowed are whole numbers from 1"),
        (dict(taps=1), "taps=1: allowed are True and False"),
        (dict(thread_m=2), "thread_m=2: allowed are multiples of 4"),
        (dict(thread_p=12), "thread_p=12: a divisor of block_p=32"),
        (
            dict(block_m=32, thread_m=16, thread_p=16),
            "thread_m=16, thread_p=16: more than 128 accumulators",
        ),
        (
            dict(block_m=20),
            "block_m=20, block_p=32, thread_m=4, thread_p=4: 40 threads; "
            "allowed are up to 1024, in rectangles of 32",
        ),
        (
            dict(block_m=256, block_p=256),
            "block_m=256, block_p=256, thread_m=4, thread_p=4: 4096 threads; "
            "allowed are up to 1024, in rectangles of 32",
        ),
        (dict(stages=1), "stages=1: allowed are 2 to 8"),
        (dict(stages=9), "stages=9: allowed are 2 to 8"),
        (dict(taps=True), "taps=True: in_channels/groups=3 is no multiple of block_k=8"),
        (dict(split=6), "split=6: allowed are 1 to 5"),
        (dict(block_k=4, split=9), "split=9: allowed are 1 to 8"),
        (dict(blocks=65), "blocks=65: a multiprocessor takes 2048 threads"),
        (
            dict(blocks=40),
            "blocks=40: 40 times 32 threads of some 64 registers; "
            "a multiprocessor has them for 1024",
        ),
        (
            dict(block_k=512, block_m=64, stages=4),
            "stages=4: 1 times 790528 bytes of 233472, shared memory",
        ),
        (dict(blocks=30, stages=8), "stages=8: 30 times 12608 bytes of 233472, shared memory"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_configurations(fields, message):
    schedule = SCHEDULES[FORMS[0]]
    assert schedule.check(config_of(), RAGGED, TARGET) is None
    assert schedule.check(config_of(**fields), RAGGED, TARGET) == message
    with pytest.raises(ScheduleError) as caught:
        im2win_tvm.compile(
            RAGGED, TARGET, schedule=FORMS[0], config={**vars(config_of()), **fields}
        )
    assert str(caught.value) == message


def test_clusters_are_refused_before_sm_90_and_the_schedule_before_sm_80():
    schedule, config = SCHEDULES[FORMS[0]], config_of(split=2)
    assert schedule.check(config, RAGGED, TARGET) is None
    assert schedule.check(config, RAGGED, CudaTarget("sm_86")) == (
        "split=2: clusters need sm_90, the target is sm_86"
    )
    assert all(c.split == 1 for c in schedule.configs(RAGGED, CudaTarget("sm_86")))
    assert "sm_80 and later" in schedule.supports(RAGGED, CudaTarget("sm_75"))


def test_refused_problems():
    for form in FORMS:
        schedule = SCHEDULES[form]
        assert "dtype=float16" in schedule.supports(RAGGED.replace(dtype="float16"), TARGET)
        # A window of 71000 elements that is no whole number of vectors: its table is too long.
        long = ConvProblem(1, 71, (40, 40), 4, (25, 40))
        assert schedule.supports(long, TARGET) == (
            "in_channels/groups=71: a table of 71000 window elements is beyond shared memory; "
            "multiples of 8 need none"
        )
        assert schedule.supports(long.replace(in_channels=72), TARGET) is None
    wide = ConvProblem(1, 1, (1, 40000), 1, 3, 1, 1)
    assert SCHEDULES[FORMS[0]].supports(wide, TARGET) == (
        "taps=False: input_size=(1, 40000) with its padding is beyond 32768"
    )
    assert SCHEDULES[FORMS[1]].supports(wide, TARGET) is None
    large = ConvProblem(512, 64, (200, 200), 1, 7)
    assert r"I' has 2**31 elements or more" in SCHEDULES[FORMS[1]].supports(large, TARGET)
    assert SCHEDULES[FORMS[0]].supports(large, TARGET) is None


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        # 2**20 groups of one channel: 2**31 * 2.1 elements in tiles of 16, 9.4 million without.
        (
            ConvProblem(1, 2**20, (16, 16), 2**20, (11, 11), groups=2**20),
            "block_m=16: in whole tiles the filter has 2**31 elements or more",
        ),
        (
            ConvProblem(1, 1, (2**15, 2**14), 1, 1),
            "output_shape=(1, 1, 32768, 16384): cuda_simt_async takes below 2**29 pixels",
        ),
        (
            ConvProblem(1, 8, (64, 64), 8, 3, 2**15, 9000, 1),
            "padding=((9000, 9000), (9000, 9000)): with it the input has 2**31 elements or more",
        ),
    ],
)
def test_offsets_beyond_32_bits_are_refused(problem, message):
    assert SCHEDULES[FORMS[0]].supports(problem, TARGET) == message
    with pytest.raises(ScheduleError) as caught:
        im2win_tvm.compile(problem, TARGET, schedule=FORMS[0])
    assert message in str(caught.value)


@pytest.mark.parametrize("form", ["cuda_simt", "cuda_simt_async"])
def test_the_filter_is_counted_in_the_tiles_that_it_is_packed_in(form):
    """257 x 8355712 weights are fewer than 2**31; in 272 or 384 rows they are more."""
    schedule, problem = SCHEDULES[form], ConvProblem(1, 8355712, (1, 1), 257, 1)
    assert math.prod(problem.weight_shape) < 2**31
    assert "in whole tiles the filter has 2**31 elements" in schedule.supports(problem, TARGET)
    assert schedule.supports(problem.replace(out_channels=128), TARGET) is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "problem",
    [
        ConvProblem(1, 8, (8, 8), 8, 1, 1, 0, 2**31),
        ConvProblem(1, 3, (5, 5), 4, 5, 2**31),
        ConvProblem(1, 1, (2**14, 2**14 + 2), 1, 3),
    ],
    ids=str,
)
def test_steps_and_sizes_near_32_bits_compile(form, problem):
    schedule = SCHEDULES[form]
    module = schedule.build(problem, schedule.default(problem, TARGET), TARGET)
    assert "im2win_conv_kernel" in lower.cuda_source(lower.lower(module), TARGET)


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("layer", "layout", "arch"),
    [
        pytest.param("conv2", "NCHW", "sm_90", marks=pytest.mark.slow),
        ("conv3", "NHWC", "sm_80"),
        pytest.param("conv8", "NCHW", "sm_80", marks=pytest.mark.slow),
        ("conv12", "NHWC", "sm_90"),
    ],
)
def test_code(layer, layout, arch, tmp_path):
    """No spills, and copies, fragments and stores of 128 bits."""
    problem, target = suites.suite("paper", 128, layout=layout)[layer], CudaTarget(arch)
    schedule = SCHEDULES[FORMS[0]]
    module = schedule.build(problem, schedule.default(problem, target), target)
    source = lower.cuda_source(lower.lower(module), target)
    (tmp_path / "kernel.cu").write_text(source)
    report = toolchain.build_cuda_library(
        tmp_path / "kernel.so", tmp_path / "kernel.cu", target.arch, []
    )
    kernels = toolchain.parse_resources(report)
    assert {k.kernel for k in kernels} == {"im2win_prepare_kernel", "im2win_conv_kernel"}
    assert all(k.stack_bytes == k.spill_store_bytes == k.spill_load_bytes == 0 for k in kernels)
    ptx = toolchain.compile_ptx(source, target.arch)
    for instruction in ("cp.async.cg.shared.global", "ld.shared.v4.f32", "st.global.v4.f32"):
        assert instruction in ptx
