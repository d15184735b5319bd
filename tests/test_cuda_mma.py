"""The mma.sync schedule on a machine without a GPU: simulated, and through nvcc."""

import functools
import itertools
import random

import numpy as np
import pytest
from emulated import assert_nan_and_infinity_stay_local, assert_right
from problems import HALVES_RAGGED as RAGGED
from problems import LAYOUTS, edge_problems, halves, odd_problems, problem_id
from simt_switches import TARGET

import im2win_tvm
from im2win_tvm import lower, simulate, suites, toolchain
from im2win_tvm.epilogue import NONE, Epilogue
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES, ScheduleError
from im2win_tvm.schedules.cuda_channels_last import copy_channels_last, is_needed
from im2win_tvm.schedules.cuda_mma_kernel import convolve
from im2win_tvm.schedules.cuda_mma_tiles import MULTIPLICANDS, Config
from im2win_tvm.target import CudaTarget

FORM = "cuda_mma"
SCHEDULE = SCHEDULES[FORM]
HOPPER = CudaTarget("sm_90a")
WHOLE = ConvProblem(2, 64, (8, 8), 64, 3, dtype="float16", layout="NHWC")
assert_equal = functools.partial(assert_right, FORM, kinds=("integer",))


@pytest.mark.parametrize(
    "problem",
    [
        *halves(odd_problems(11, 8, most_work=200_000)),
        *(
            pytest.param(problem, marks=pytest.mark.slow)
            for problem in halves(
                [*(p for _, p in edge_problems()), *odd_problems(12, 120, most_work=1_000_000)]
            )
        ),
    ],
    ids=problem_id,
)
def test_odd_problems(problem):
    assert_equal(problem)


@pytest.mark.parametrize("problem", [RAGGED, WHOLE], ids=problem_id)
@pytest.mark.parametrize(
    "config",
    [
        Config(32, 32, 32, 32, 16, stages=2),
        Config(32, 32, 64, 32, 16, stages=3),
        Config(64, 16, 32, 32, 16, stages=4),
        Config(64, 64, 32, 64, 16, stages=8),
        Config(128, 64, 64, 32, 64, stages=2),
        Config(64, 256, 32, 64, 64, stages=3),
        Config(32, 128, 32, 32, 128, stages=2),
        Config(128, 32, 32, 128, 32, stages=2),
    ],
    ids=str,
)
def test_configurations(problem, config):
    assert_equal(problem, config)


@pytest.mark.parametrize("problem", [RAGGED, WHOLE.replace(dtype="bfloat16")], ids=problem_id)
@pytest.mark.parametrize(
    "config",
    [
        Config(32, 64, 64, 32, 16, stages=3, wgmma=True),
        Config(64, 128, 64, 64, 16, stages=4, wgmma=True),
        Config(96, 128, 64, 96, 32, stages=3, wgmma=True),
        Config(256, 64, 64, 256, 16, stages=3, wgmma=True),
        Config(96, 192, 64, 96, 16, stages=6, wgmma=True),
    ],
    ids=str,
)
def test_four_warps_together(problem, config):
    assert_equal(problem, config, Epilogue(True, True, "relu"), target=HOPPER)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [2, 78, 80, 130])
def test_inputs_that_are_copied_first(layout, channels):
    """Fewer and more channels than a tile of the copy, whole eights and not."""
    problem = RAGGED.replace(in_channels=channels, layout=layout)
    assert is_needed(problem) == (channels != 80 or layout == "NCHW")
    assert_right(FORM, problem, epilogue=Epilogue(True, True, "relu"))


@pytest.mark.parametrize("turn", range(6))
def test_sampled_configurations(turn):
    chance = random.Random(turn)
    config = chance.choice(list(SCHEDULE.configs(RAGGED, TARGET)))
    assert_right(FORM, RAGGED, config, Epilogue(True, True, "relu"), kinds=("integer", "normal"))


@pytest.mark.parametrize(
    ("bias", "residual", "activation"),
    list(itertools.product([False, True], [False, True], [None, "relu"])),
)
def test_epilogues(bias, residual, activation):
    epilogue = Epilogue(bias, residual, activation)
    assert_equal(RAGGED, epilogue=epilogue)
    assert_equal(WHOLE.replace(dtype="bfloat16"), epilogue=epilogue)


@pytest.mark.parametrize(
    "problem",
    [RAGGED, WHOLE.replace(dtype="bfloat16"), RAGGED.replace(in_channels=18, layout="NCHW")],
    ids=problem_id,
)
def test_nan_and_infinity_reach_the_outputs_that_read_them_and_no_others(problem):
    assert_nan_and_infinity_stay_local(FORM, problem)
    together = Config(64, 128, 64, 64, 16, stages=4, wgmma=True)
    assert_nan_and_infinity_stay_local(FORM, problem, together, HOPPER)


@pytest.mark.parametrize("block_k", [32, 64])
@pytest.mark.parametrize("problem", [RAGGED, WHOLE], ids=problem_id)
def test_shared_memory_has_no_bank_conflicts(problem, block_k):
    function = convolve(problem, Config(64, 64, block_k, 32, 32), NONE)
    arrays = {p.name: np.ones([int(n) for n in p.shape], "float16") for p in function.params}
    report = simulate.run(function, arrays, conflicts=True)
    assert sum(entry.wavefronts for entry in report.conflicts.values()) > 1000
    assert [s for s, entry in report.conflicts.items() if entry.extra] == []


def test_the_copy_has_no_bank_conflicts():
    function = copy_channels_last(RAGGED.replace(layout="NCHW"))
    arrays = {p.name: np.ones([int(n) for n in p.shape], "float16") for p in function.params}
    report = simulate.run(function, arrays, conflicts=True)
    assert sum(entry.wavefronts for entry in report.conflicts.values()) > 1000
    assert [s for s, entry in report.conflicts.items() if entry.extra] == []


def test_every_proposal_is_valid_and_so_is_the_default():
    for target in (HOPPER, TARGET, *map(CudaTarget, ("sm_80", "sm_86", "sm_89"))):
        proposed = list(SCHEDULE.configs(RAGGED, target))
        assert len(set(proposed)) == len(proposed) > 50
        for config in (*proposed, SCHEDULE.default(RAGGED, target)):
            assert SCHEDULE.check(config, RAGGED, target) is None, config
            assert target == HOPPER or not config.wgmma


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(block_m=0), "block_m=0: allowed are whole numbers from 1"),
        (dict(blocks=True), "blocks=True: allowed are whole numbers from 1"),
        (dict(block_k=48), "block_k=48: allowed are 32 and 64"),
        (dict(warp_m=16), "warp_m=16: a multiple of 32 that divides block_m=32"),
        (dict(warp_m=64), "warp_m=64: a multiple of 32 that divides block_m=32"),
        (dict(warp_p=24), "warp_p=24: a multiple of 16 that divides block_p=32"),
        (
            dict(block_m=128, warp_m=128, block_p=64, warp_p=64),
            "warp_m=128, warp_p=64: more than 128 sums a thread",
        ),
        (dict(block_p=1024), "block_m=32, block_p=1024: 2048 threads, above 1024"),
        (
            dict(block_m=96, block_p=16),
            "block_p=16: its 64 copies do not divide among 96 threads",
        ),
        (dict(stages=1), "stages=1: allowed are 2 to 8"),
        (dict(blocks=33), "blocks=33: a multiprocessor takes 2048 threads"),
        (
            dict(blocks=20),
            "blocks=20: 20 times 64 threads of some 82 registers; a multiprocessor has 65536",
        ),
        (dict(wgmma=1), "wgmma=1: allowed are True and False"),
        (dict(wgmma=True), "wgmma=True: it needs sm_90a, the target is sm_90"),
        (
            dict(block_m=128, block_p=256, warp_m=64, warp_p=64, block_k=64, stages=5),
            "stages=5: 246784 bytes of 233472, shared memory",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_configurations(fields, message):
    config = {**vars(Config(32, 32, 32, 32, 16)), **fields}
    assert SCHEDULE.check(Config(**config), RAGGED, TARGET) == message
    with pytest.raises(ScheduleError) as caught:
        im2win_tvm.compile(RAGGED, TARGET, schedule=FORM, config=config)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(block_k=32), "block_k=32: allowed are 64"),
        (dict(warp_m=32), "warp_m=32: with wgmma all of block_m=64, up to 256"),
        (dict(block_p=32), "warp_p=16: with wgmma a quarter of block_p=32, or of a part"),
        (dict(stages=2), "stages=2: with wgmma allowed are 3 to 8"),
    ],
)
def test_refused_configurations_of_four_warps(fields, message):
    config = vars(Config(64, 64, 64, 64, 16, wgmma=True))
    assert SCHEDULE.check(Config(**config), RAGGED, HOPPER) is None
    assert SCHEDULE.check(Config(**{**config, **fields}), RAGGED, HOPPER) == message


@pytest.mark.parametrize(
    ("fields", "target", "message"),
    [
        (dict(dtype="float32"), TARGET, "dtype=float32: cuda_mma takes float16 and bfloat16"),
        ({}, CudaTarget("sm_75"), "arch=sm_75: cuda_mma takes sm_80 and later"),
        (
            dict(batch=1, in_channels=2, input_size=(16384, 8192), out_channels=2, stride=64),
            TARGET,
            "input_shape=(1, 16384, 8192, 2): in eights of channels 2**31 or more",
        ),
        (
            dict(stride=4000, padding=6000),
            TARGET,
            "padding=((6000, 6000), (6000, 6000)): with it the input has 2**31 elements or more",
        ),
    ],
)
def test_refused_problems(fields, target, message):
    assert SCHEDULE.supports(RAGGED, TARGET) is None
    assert SCHEDULE.supports(RAGGED.replace(**fields), target) == message


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("layer", "dtype", "arch", "config"),
    [
        ("conv9", "float16", "sm_80", None),
        ("conv8", "bfloat16", "sm_86", Config(128, 128, 32, 64, 64, 3)),
        pytest.param(
            "conv12", "float16", "sm_89", Config(128, 64, 64, 32, 32, 3), marks=pytest.mark.slow
        ),
        pytest.param(
            "conv6", "bfloat16", "sm_90", Config(64, 128, 64, 32, 64, 3, 2), marks=pytest.mark.slow
        ),
        ("conv8", "float16", "sm_90a", Config(128, 256, 64, 128, 32, 4, wgmma=True)),
        pytest.param("conv12", "bfloat16", "sm_90a", None, marks=pytest.mark.slow),
    ],
)
def test_code(layer, dtype, arch, config, tmp_path):
    """No spills; copies, operands, products and stores by the instructions that they are for."""
    problem = suites.suite("paper", 128, dtype=dtype, layout="NHWC")[layer]
    target = CudaTarget(arch)
    module = SCHEDULE.build(problem, config or SCHEDULE.default(problem, target), target)
    source = lower.cuda_source(lower.lower(module), target)
    (tmp_path / "kernel.cu").write_text(source)
    report = toolchain.build_cuda_library(
        tmp_path / "kernel.so", tmp_path / "kernel.cu", target.arch, []
    )
    kernels = toolchain.parse_resources(report)
    assert {k.kernel for k in kernels} == {"im2win_prepare_kernel", "im2win_conv_kernel"}
    assert all(k.stack_bytes == k.spill_store_bytes == k.spill_load_bytes == 0 for k in kernels)
    assert "wgmma" not in report  # ptxas says where it has to make them wait for each other
    ptx = toolchain.compile_ptx(source, target.arch)
    kind, products = MULTIPLICANDS[dtype], ["wgmma.mma_async.sync.aligned"]
    if target != HOPPER:
        products = [
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
            "ld.shared.v4.u32",
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32",
        ]
    for instruction in ("cp.async.cg.shared.global", "st.global.v4.u32", *products):
        assert instruction in ptx, instruction
