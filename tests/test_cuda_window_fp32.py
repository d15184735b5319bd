"""Float32 by halves on Hopper, on a machine without a GPU: simulated, and through nvcc."""

import functools

import numpy as np
import pytest
from emulated import assert_nan_and_infinity_stay_local
from fp32_errors import DATA, data, fma_chain, rms, windows
from problems import odd_problems, problem_id
from window_cases import BASE, CASES, EPILOGUES, FEW, IMAGES, STRIDED

import im2win_tvm
import im2win_tvm.parsing
from im2win_tvm import emulate, lower, reference, suites, tensors, toolchain
from im2win_tvm.epilogue import NONE, Epilogue
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES, ScheduleError
from im2win_tvm.schedules.cuda_window import folded, grid
from im2win_tvm.schedules.cuda_window_fp32_tiles import Config, SplitGeometry, registers
from im2win_tvm.target import CudaTarget

HOPPER = CudaTarget("sm_90a")
SCHEDULE = SCHEDULES["cuda_window_fp32"]
FULL = Epilogue(True, True, "relu")
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
B, MANY, S = (p.replace(dtype="float32") for p in (BASE, IMAGES, STRIDED))
# Largest error of an output by the sum of its products' magnitudes, in 2^-24: what is seen is 3.
MOST = 6


def assert_right(problem, config=None, epilogue=NONE, seed=3, kinds=("normal",)):
    """Integers are exact; others, of scales that differ from image to image and from output to
    output, are right to a few units, so that a scale of another block would be seen."""
    config = config or SCHEDULE.default(problem, FEW)
    chance = np.random.default_rng(seed)
    for kind in kinds:
        made = tensors.fill(problem, kind, seed, epilogue.bias, epilogue.residual)
        given = {name: array for name, array in made._asdict().items() if array is not None}
        if kind == "normal":
            spread = [problem.batch, 1, 1, 1]
            if config.block == "pixel":
                spread = list(problem.input_shape)
                spread[3 if problem.channels_last else 1] = 1
            each = chance.integers(-9, 10, (problem.out_channels, 1, 1, 1))
            given["x"] = given["x"] * np.exp2(chance.integers(-9, 10, spread)).astype("f4")
            given["w"] = given["w"] * np.exp2(each).astype("f4")
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


TRIED = {
    "rows": (B, Config(1, 2, 8, along_p=2)),
    "along channels": (B.replace(in_channels=50, layout="NCHW"), Config(1, 2, 8, along_m=2)),
    "images": (MANY, Config(8, 1, 3, True, along_p=2)),
    "32 images": (MANY.replace(batch=33, in_channels=16), Config(32, 1, 2, True)),
    "24 images": (MANY.replace(batch=25, in_channels=36), Config(24, 1, 2, True, along_p=2)),
    "resident": (
        B.replace(in_channels=32),
        Config(1, 2, 8, filter_stages=0, taps="row", pixel_stages=3),
    ),
    "dense": (S.replace(batch=9, input_size=(9, 7)), Config(8, 2, 2, True, dense=True)),
    "stride": (S, Config(1, 2, 8, along_m=1)),
    "split": (MANY.replace(in_channels=40), Config(8, 1, 3, True, taps="tap", split=3)),
    "one row": (
        B.replace(kernel_size=1, padding=0, in_channels=136),
        Config(1, 1, 32, along_p=2, block="pixel"),
    ),
    "a patch of several turns": (
        MANY.replace(batch=8, input_size=(8, 9), in_channels=16),
        Config(8, 2, 3, True, along_p=2),
    ),
    "pixels": (B.replace(in_channels=40), Config(2, 1, 8, block="pixel", along_p=2)),
    "pixels of images": (MANY.replace(in_channels=36), Config(8, 1, 2, True, block="pixel")),
}


# More of what others show.
MORE = {"pixels of images", "24 images", "32 images", "a patch of several turns"}


@pytest.mark.parametrize(
    ("turn", "name"),
    [
        pytest.param(turn, name, id=name, marks=[pytest.mark.slow] * (name in MORE))
        for turn, name in enumerate(TRIED)
    ],
)
def test_configurations(turn, name):
    """Two multiprocessors take all tiles: rings go round."""
    problem, config = TRIED[name]
    walked = folded(problem)
    assert config.split > 1 or SplitGeometry(walked, config).tiles >= grid(walked, config, FEW)
    kinds = ("integer", "normal") if name in ("rows", "stride") else ("normal",)
    assert_right(problem, config, EPILOGUES[turn % 8], kinds=kinds)


@pytest.mark.slow
@pytest.mark.parametrize("block", ["patch", "pixel"])
@pytest.mark.parametrize("name", CASES)
def test_configurations_of_cuda_window(name, block):
    problem, config = CASES[name]
    problem = problem.replace(dtype="float32")
    config = Config(**vars(config) | dict(turns=False, blocks=1, block=block))
    refused = SCHEDULE.supports(problem, FEW) or SCHEDULE.check(config, problem, FEW)
    if refused:
        pytest.skip(refused)
    assert_right(problem, config, FULL)


def taken(count, seed, most_work):
    found = [p.replace(dtype="float32") for p in odd_problems(seed, count, most_work=most_work)]
    return [p for p in dict.fromkeys(found) if SCHEDULE.supports(p, FEW) is None]


@pytest.mark.parametrize(
    "problem", [*taken(14, 31, 200_000)[:3], *map(slow, taken(120, 32, 800_000))], ids=problem_id
)
def test_odd_problems(problem):
    """As the schedule would do them."""
    assert_right(problem, None, FULL)


@pytest.mark.parametrize(
    ("problem", "config"),
    [
        (B.replace(batch=1, in_channels=40), Config(1, 2, 8)),
        (B.replace(batch=1, in_channels=40), Config(1, 2, 8, block="pixel")),
        slow(MANY.replace(in_channels=32), Config(8, 1, 2, True)),
    ],
    ids=str,
)
def test_nan_and_infinity_reach_the_outputs_that_read_them_and_no_others(problem, config):
    assert_nan_and_infinity_stay_local("cuda_window_fp32", problem, config, FEW)


SMALL = ConvProblem(2, 40, (4, 8), 5, 3, 1, 1, dtype="float32", layout="NHWC")


@pytest.mark.parametrize("block", ["patch", slow("pixel")])
@pytest.mark.parametrize("kind", DATA)
def test_errors_are_no_larger_than_those_of_a_chain_of_fma(kind, block):
    """In the simulator, whose tensor cores round: see test_cuda_window_fp32_errors for others."""
    x, w = data(kind, SMALL)
    actual = emulate.run(SCHEDULE, SMALL, Config(1, 2, 8, block=block), FEW, {"x": x, "w": w})
    exact = reference.conv2d(x, w, SMALL)
    chain = fma_chain(windows(x, SMALL), w.reshape(len(w), -1)).reshape(exact.shape)
    # Image by image: the largest would hide the others.
    for got, fma, right in zip(actual, chain, exact, strict=True):
        assert rms(got - right, right) <= rms(fma - right, right)
        assert np.abs(got - right).max() <= 1.5 * np.abs(fma - right).max()


def test_registers_are_those_of_the_multiprocessor():
    for consumers in (1, 2):
        given = registers(consumers)
        taken = given.producer + given.splitter + consumers * given.consumer
        assert taken <= (consumers + 2) * given.launched <= 65536 // 128
        assert all(n % 8 == 0 for n in given)


PROPOSALS = [
    B.replace(input_size=(4, 5)),
    B.replace(batch=20, input_size=(3, 3), stride=2),
    B.replace(groups=2, layout="NCHW", input_size=(5, 5)),
]


@pytest.mark.parametrize("problem", PROPOSALS, ids=problem_id)
def test_every_proposal_is_valid_and_so_is_the_default(problem):
    found = list(SCHEDULE.configs(problem, HOPPER))
    assert len(set(found)) == len(found) > 20
    default = SCHEDULE.default(problem, HOPPER)
    costs = {config: SCHEDULE.estimate(problem, config, HOPPER) for config in found}
    assert 0 < costs[default] == min(costs.values())


BAD = {
    "turns": (dict(turns=True), "turns=True, blocks=1: cuda_window_fp32 takes False and 1"),
    "blocks": (dict(blocks=2), "turns=False, blocks=2: cuda_window_fp32 takes False and 1"),
    "block": (dict(block="tile"), "block='tile': allowed are 'patch' and 'pixel'"),
    "several images": (
        dict(tile_n=2),
        "tile_n=2: with block='patch' 1, or with images=True up to 32; block='pixel' takes any",
    ),
    "warpgroups": (dict(along_m=3), "along_m=3, along_p=1: more than 2 warpgroups"),
    "sums": (
        dict(tile_h=22, along_m=2),
        "tile_n=1, tile_h=22, tile_w=8: 88 sums a thread, twice; there is room for 81",
    ),
    "shared memory": (
        dict(pixel_stages=60),
        "pixel_stages=60, filter_stages=4: 342832 bytes of 232448, shared memory",
    ),
    "filter_stages": (
        dict(filter_stages=1),
        "filter_stages=1: allowed are 0, for all of the filter, and 2 or more",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_configurations(name):
    fields, message = BAD[name]
    config = Config(**{**vars(Config(1, 2, 8)), **fields})
    assert SCHEDULE.check(config, B, HOPPER) == message
    with pytest.raises(ScheduleError) as caught:
        im2win_tvm.compile(B, HOPPER, schedule="cuda_window_fp32", config=config)
    assert str(caught.value) == message


def test_a_block_is_of_one_image():
    """In 1x1 convolutions all images are one long row, where a patch has pixels of several."""
    pointwise = B.replace(kernel_size=1, padding=0, in_channels=136)
    assert SCHEDULE.check(Config(1, 1, 32), pointwise, HOPPER).startswith("block='patch': of 1x1")
    assert SCHEDULE.check(Config(1, 1, 32), pointwise.replace(batch=1), HOPPER) is None
    assert {c.block for c in SCHEDULE.configs(pointwise, HOPPER)} == {"pixel"}


@pytest.mark.parametrize(
    ("fields", "target", "message"),
    [
        (dict(dtype="float16"), HOPPER, "dtype=float16: cuda_window_fp32 takes float32"),
        ({}, CudaTarget("sm_90"), "arch=sm_90: cuda_window_fp32 takes sm_90a"),
        (dict(in_channels=12), HOPPER,
         "in_channels=12, groups=1: cuda_window_fp32 takes 16 channels a group or more "
         "(cuda_simt_async takes any)"),
        (dict(in_channels=32, kernel_size=1, padding=0), HOPPER,
         "k=32: cuda_window_fp32 takes 96 or more products an output, where its errors are no "
         "larger than those of a chain of fma (cuda_simt_async takes any)"),
    ],
)  # fmt: skip
def test_refused_problems(fields, target, message):
    assert SCHEDULE.supports(B, HOPPER) is None
    assert SCHEDULE.supports(B.replace(**fields), target) == message


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("layer", "config"),
    [
        ("conv9", Config(1, 14, 8, along_p=2, pixel_stages=3, filter_stages=9)),
        slow(
            "conv5", Config(8, 1, 20, True, along_m=2, taps="row", pixel_stages=4, filter_stages=7)
        ),
        slow("conv9", Config(8, 1, 18, True, along_p=2, filter_stages=6, block="pixel")),
    ],
)
def test_code(layer, config, tmp_path):
    """No spills; products by the instructions that they are for; no approximate arithmetic."""
    problem = suites.suite("paper", 128, layout="NHWC")[layer]
    source = lower.cuda_source(lower.lower(SCHEDULE.build(problem, config, HOPPER, NONE)), HOPPER)
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
        "wgmma.mma_async.sync.aligned.m64n",
        "k16.f32.f16.f16",
        "cp.async.bulk.tensor.5d.shared::cluster.global",
        "cvt.rn.f16x2.f32",
        "fma.rn.f32",
        "fence.proxy.async.shared::cta",
    ):
        assert instruction in ptx, instruction
    assert ".ftz" not in ptx and ".approx" not in ptx
