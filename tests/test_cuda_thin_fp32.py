"""Float32 of few channels by halves, on a machine without a GPU: simulated, and through nvcc."""

import functools

import numpy as np
import pytest
from emulated import assert_nan_and_infinity_stay_local
from fp32_errors import DATA, data, fma_chain, rms, windows
from problems import odd_problems, problem_id
from thin_cases import BASE, CASES, EPILOGUES, FEW, FULL, drawn_fp32, fp32_case, fp32_config
from tvm.script import tirx as T

import im2win_tvm
import im2win_tvm.parsing
from im2win_tvm import emulate, lower, reference, suites, tensors, toolchain
from im2win_tvm.epilogue import NONE
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES, ScheduleError
from im2win_tvm.schedules.cuda_thin_fp32_split import Halves
from im2win_tvm.schedules.cuda_thin_fp32_tiles import SplitGeometry, word_of
from im2win_tvm.schedules.cuda_thin_tiles import Config
from im2win_tvm.select import select
from im2win_tvm.simulate import SimulationError, run
from im2win_tvm.target import CudaTarget

HOPPER = CudaTarget("sm_90a")
SCHEDULE = SCHEDULES["cuda_thin_fp32"]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
B = BASE.replace(dtype="float32")
# Largest error of an output by the sum of its products' magnitudes, in 2^-24: what is seen is 3.
MOST = 5


def assert_right(problem, config=None, epilogue=NONE, seed=3, kinds=("normal",)):
    """Integers are exact; others, of scales that differ from image to image and from output to
    output, are right to a few units, so that a scale of another window would be seen."""
    config = config or SCHEDULE.default(problem, FEW)
    chance = np.random.default_rng(seed)
    for kind in kinds:
        made = tensors.fill(problem, kind, seed, epilogue.bias, epilogue.residual)
        given = {name: array for name, array in made._asdict().items() if array is not None}
        if kind == "normal":
            for name in ("x", "w"):
                spread = np.exp2(chance.integers(-9, 10, (len(given[name]), 1, 1, 1)))
                given[name] = given[name] * spread.astype("f4")
        actual = emulate.run(SCHEDULE, problem, config, FEW, given, epilogue)
        others = (given.get("bias"), given.get("residual"))
        expected = reference.conv2d(
            given["x"], given["w"], problem, *others, activation=epilogue.activation
        )
        if kind == "integer":
            np.testing.assert_array_equal(actual, expected)
            continue
        most = reference.conv2d(
            *map(np.abs, (given["x"], given["w"])),
            problem,
            *(o if o is None else abs(o) for o in others),
        )
        assert not np.isnan(actual).any()
        error = np.abs(actual - expected) / np.maximum(most, 1e-300)
        assert error.max() * 2**24 <= MOST, config


# Those that show something that the others do not.
QUICK = {
    ("dilation", "NCHW"), ("large patches", "NHWC"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("turn", "name", "layout"),
    [
        pytest.param(
            turn, name, layout, id=f"{name}, {layout}",
            marks=[] if (name, layout) in QUICK else [pytest.mark.slow],
        )
        for turn, name in enumerate(CASES)
        for layout in ("NHWC", "NCHW")
        if name != "four blocks"
    ],
)  # fmt: skip
def test_configurations(turn, name, layout):
    """Two multiprocessors take all tiles: rings go round."""
    problem, config = fp32_case(name, layout)
    assert SCHEDULE.check(config, problem, FEW) is None
    assert_right(problem, config, EPILOGUES[turn % 8])


def few_channels(count, seed, most_work):
    found = []
    for turn, problem in enumerate(odd_problems(seed, count, most_work=most_work)):
        channels = (1, 3, 4, 5, 12)[turn % 5]
        found.append(problem.replace(groups=1, in_channels=channels, dtype="float32"))
    return [p for p in dict.fromkeys(found) if SCHEDULE.supports(p, FEW) is None]


@pytest.mark.parametrize(
    "problem",
    [*few_channels(9, 31, 100_000)[:1], *map(slow, few_channels(120, 32, 800_000))],
    ids=problem_id,
)
def test_odd_problems(problem):
    """As the schedule would do them."""
    assert_right(problem, None, FULL)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", list(drawn_fp32(5, 60)), ids=str)
def test_drawn_configurations(chosen):
    """Nobody proposes them, but `check` allows them."""
    assert_right(*chosen, FULL, kinds=("integer", "normal"))


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        slow(dict(kernel_size=6, padding=2, layout="NCHW", in_channels=4)),
        slow(dict(stride=1)),
    ],
    ids=str,
)
def test_nan_and_infinity_reach_the_outputs_that_read_them_and_no_others(fields):
    """Of three halves and of two; the other numbers of a window keep their scale."""
    problem = B.replace(**{"batch": 1, "input_size": (9, 11), "out_channels": 9, **fields})
    assert_nan_and_infinity_stay_local("cuda_thin_fp32", problem, fp32_config(problem), FEW)


SMALL = {
    27: ConvProblem(2, 3, (5, 11), 5, 3, 1, 1, dtype="float32", layout="NHWC"),
    147: ConvProblem(2, 3, (9, 11), 5, 7, 2, 3, dtype="float32", layout="NHWC"),
    363: ConvProblem(2, 3, (15, 18), 5, 11, 4, 2, dtype="float32", layout="NHWC"),
}
FEW_KINDS = {(27, 2): ("denormal",), (147, 1): ("2^+-40 over images",)}


@pytest.mark.parametrize(
    ("k", "kind", "steps"),
    [
        pytest.param(
            k, kind, steps,
            marks=[] if kind in FEW_KINDS.get((k, steps), ()) else [pytest.mark.slow],
        )
        for k in SMALL
        for kind in DATA
        for steps in (1, 2)
    ],
)  # fmt: skip
def test_errors_are_no_larger_than_those_of_a_chain_of_fma(k, kind, steps):
    """In the simulator, whose tensor cores round: see test_cuda_thin_fp32_errors for others."""
    problem = SMALL[k]
    x, w = data(kind, problem)
    config = fp32_config(problem, steps=steps)
    actual = emulate.run(SCHEDULE, problem, config, FEW, {"x": x, "w": w})
    exact = reference.conv2d(x, w, problem)
    chain = fma_chain(windows(x, problem), w.reshape(len(w), -1)).reshape(exact.shape)
    # Image by image: the largest would hide the others.
    for got, fma, right in zip(actual, chain, exact, strict=True):
        assert rms(got - right, right) <= rms(fma - right, right)
        assert np.abs(got - right).max() <= 1.5 * np.abs(fma - right).max()


# Halves


def split_of(values, count):
    """The halves of rows of two numbers, and what they add up to."""

    # fmt: off
    @T.prim_func
    def kernel(x: T.Buffer((32, 2), "float32"), y: T.Buffer((count, 32), "uint32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([32])
        halves = Halves(count)
        halves.split(x[t, 0], x[t, 1])
        for i in T.unroll(count):
            y[i, t] = halves.word[i]
    # fmt: on

    y = np.zeros((count, 32), "uint32")
    run(kernel, {"x": values, "y": y})
    return y.view("float16").reshape(count, 32, 2).astype("float64")


@pytest.mark.parametrize("count", [2, 3])
def test_halves_add_up_to_the_number(count):
    chance = np.random.default_rng(4)
    signed = chance.uniform(0.5, 1, (32, 2)) * chance.choice([-1, 1], (32, 2))
    values = (signed * 2.0 ** chance.integers(0, 16, (32, 2))).astype("f4")
    halves = split_of(values, count)
    error = np.abs(halves.sum(axis=0) - values)
    assert (error <= (0 if count == 3 else 2.0**-23) * np.abs(values)).all()
    if count == 3:
        # The products of two first halves have 16 bits.
        assert (halves[0].astype("float32").view("uint32") & 0xFFFF == 0).all()
    assert (np.abs(halves[1]) <= 2.0 ** (-7 if count == 3 else -11) * np.abs(values)).all()


@pytest.mark.parametrize("count", [2, 3])
def test_an_infinity_is_in_one_half_and_a_nan_in_all(count):
    values = np.ones((32, 2), "float32")
    values[:3, 0] = np.inf, -np.inf, np.nan
    halves = split_of(values, count)
    for at, sign in ((0, 1), (1, -1)):
        assert np.isfinite(halves[:-1, at, 0]).all() and halves[-1, at, 0] == sign * np.inf
        assert halves[0, at, 0] * sign > 0
    assert np.isnan(halves[:, 2, 0]).all()
    np.testing.assert_array_equal(halves[:, :3, 1].sum(axis=0), 1)


def test_words_of_a_step_are_those_of_its_threads():
    """Of each thread the registers hold word t of the fours 0 and 1, and 2 and 3."""
    for t in range(4):
        mine = [word_of(16 + half * 8 + 2 * t + e) for half in range(2) for e in range(2)]
        assert mine == [16 + four * 4 + t for four in range(4)]


def largest_of_warps(part):
    """y = the largest of a warp, asked for by its first threads."""

    # fmt: off
    @T.prim_func
    def kernel(x: T.Buffer((64,), "int32"), y: T.Buffer((64,), "int32")):
        T.device_entry()
        T.cta_id([1])
        t = T.thread_id([64])
        top = T.local_scalar("int32")
        top = x[t]
        if t % 32 < part:
            T.ptx["redux_sync.max.s32"](top, top, T.uint32(0xFFFFFFFF))
        y[t] = top
    # fmt: on

    return kernel


def test_the_largest_of_a_warp_in_the_simulator():
    x = np.random.default_rng(1).integers(-99, 99, 64).astype("int32")
    y = np.zeros(64, "int32")
    run(largest_of_warps(32), {"x": x, "y": y})
    np.testing.assert_array_equal(y, x.reshape(2, 32).max(axis=1).repeat(32))
    with pytest.raises(SimulationError, match="by some of its threads"):
        run(largest_of_warps(31), {"x": x, "y": y})


# What it takes


def test_it_is_chosen_where_it_is_faster_and_not_where_the_rule_is_strict():
    problem = suites.layer("resnet50", "conv1", 64, "float32", "NHWC")  # of no tuning record
    assert SCHEDULE.accuracy(problem) == "fp32" and not SCHEDULE.is_strict(problem)
    assert select(problem, HOPPER).schedule is SCHEDULE
    strict = select(problem, HOPPER, accuracy="strict")
    assert strict.schedule.is_strict(problem)
    assert "docs/accuracy.md" in strict.rejected["cuda_thin_fp32"]


PROPOSALS = [
    B.replace(layout="NCHW"),
    slow(B.replace(stride=1, layout="NCHW", out_channels=300)),
    slow(B.replace(input_size=(224, 224), kernel_size=11, stride=4, batch=128)),
]


@pytest.mark.parametrize("problem", PROPOSALS, ids=problem_id)
def test_every_proposal_is_valid_and_so_is_the_default(problem):
    found = list(SCHEDULE.configs(problem, HOPPER))
    assert len(set(found)) == len(found) > 5
    default = SCHEDULE.default(problem, HOPPER)
    costs = {each: SCHEDULE.estimate(problem, each, HOPPER) for each in found}
    assert 0 < costs[default] == min(costs.values())
    for each in (default, *found):
        assert SCHEDULE.check(each, problem, HOPPER) is None, each


BAD = {
    "block_n": (dict(block_n=20), "block_n=20: allowed are multiples of 8 up to 256"),
    "channels": (dict(channels=4), "channels=4: allowed are 3"),
    "stages": (dict(stages=3), "stages=3: a tile needs 16"),
    "steps": (dict(steps=3), "steps=3: allowed are 1 to 2"),
    "registers": (
        dict(block_n=128),
        "block_n=128, steps=1: 64 sums a thread, twice, and 24 operands, there is room for 144",
    ),
    "shared memory": (
        dict(stages=2000), "block_n=40, stages=2000: {} bytes of 233472, shared memory"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_configurations(name):
    fields, message = BAD[name]
    chosen = Config(**{**vars(fp32_config(B)), **fields})
    message = message.format(SplitGeometry(B, chosen).shared_bytes + 1024)
    assert SCHEDULE.check(chosen, B, HOPPER) == message
    with pytest.raises(ScheduleError) as caught:
        im2win_tvm.compile(B, HOPPER, schedule="cuda_thin_fp32", config=chosen)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("fields", "target", "message"),
    [
        (dict(dtype="float16"), HOPPER, "dtype=float16: cuda_thin_fp32 takes float32"),
        ({}, CudaTarget("sm_90"), "arch=sm_90: cuda_thin_fp32 takes sm_90a"),
        (dict(groups=3, out_channels=42), HOPPER,
         "groups=3: cuda_thin_fp32 takes 1 (cuda_simt takes any)"),
        (dict(in_channels=13), HOPPER,
         "in_channels=13: cuda_thin_fp32 takes up to 12 (cuda_simt_async takes any)"),
        (dict(in_channels=12, kernel_size=40, input_size=(300, 300)), HOPPER,
         "block_n=8, stages=80: {} bytes of 233472, shared memory (cuda_simt_async takes any)"),
    ],
)  # fmt: skip
def test_refused_problems(fields, target, message):
    assert SCHEDULE.supports(B, HOPPER) is None
    reason = SCHEDULE.supports(B.replace(**fields), target)
    start, _, end = message.partition("{}")
    assert reason.startswith(start) and reason.endswith(end or start)


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("layer", "layout"),
    [("conv7", "NHWC"), slow("conv1", "NHWC"), slow("conv3", "NHWC"), slow("conv3", "NCHW")],
)
def test_code(layer, layout, tmp_path):
    """No spills, products by the instructions that they are for, no approximate arithmetic."""
    problem = suites.layer("paper", layer, 128, "float32", layout)
    module = SCHEDULE.build(problem, SCHEDULE.default(problem, HOPPER), HOPPER, FULL)
    source = lower.cuda_source(lower.lower(module), HOPPER)
    (tmp_path / "kernel.cu").write_text(source)
    report = toolchain.build_cuda_library(
        tmp_path / "kernel.so", tmp_path / "kernel.cu", HOPPER.arch, []
    )
    kernels = toolchain.parse_resources(report)
    assert {k.kernel for k in kernels} == {"im2win_prepare_kernel", "im2win_conv_kernel"}
    assert all(k.stack_bytes == k.spill_store_bytes == k.spill_load_bytes == 0 for k in kernels)
    # ptxas says where it has to make products wait for each other, and what it ignores.
    assert "wgmma" not in report and "C75" not in report
    ptx = toolchain.compile_ptx(source, HOPPER.arch)
    for instruction in (
        "k16.f32.f16.f16",
        "cvt.rn.satfinite.f16x2.f32",
        "redux.sync.max.s32",
        "mbarrier.try_wait",
        "setmaxnreg.inc.sync.aligned",
    ):
        assert instruction in ptx, instruction
    assert ".ftz" not in ptx and ".approx" not in ptx
