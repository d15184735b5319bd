"""Windows in shared memory on a machine without a GPU: simulated, and through nvcc."""

import functools
import itertools
import random

import pytest
from emulated import assert_nan_and_infinity_stay_local, assert_right
from problems import HALVES_RAGGED, halves, odd_problems, problem_id
from tvm_ffi import structural_hash
from window_cases import BASE, BUSY, CASES, EPILOGUES, FEW, FORMS, case_id, cases, drawn

import im2win_tvm
from im2win_tvm import lower, suites, toolchain
from im2win_tvm.epilogue import NONE, Epilogue
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES, ScheduleError
from im2win_tvm.schedules.cuda_window import folded, grid, walk
from im2win_tvm.schedules.cuda_window_tiles import Config, Geometry
from im2win_tvm.target import CudaTarget

HOPPER = CudaTarget("sm_90a")
SCHEDULE = SCHEDULES["cuda_window"]
FULL = Epilogue(True, True, "relu")
# 40 channels of the input and 38 of the output a group: outputs go straight from registers.
DIRECT, STAGED = HALVES_RAGGED, HALVES_RAGGED.replace(out_channels=80, dtype="bfloat16")


def assert_equal(problem, config=None, epilogue=NONE, kinds=("integer",), target=FEW):
    assert_right(FORMS[problem.dtype], problem, config, epilogue, kinds, target)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def mixed(problems):
    """The problems in all dtypes by turns, those that the schedules take."""
    made = [
        problem.replace(dtype="float32") if turn % 3 == 2 else problem
        for turn, problem in enumerate(halves(problems))
    ]
    return [p for p in made if SCHEDULES[FORMS[p.dtype]].supports(p, FEW) is None]


@pytest.mark.parametrize(
    "problem",
    [
        *mixed(odd_problems(21, 10, most_work=300_000)),
        *map(slow, mixed(odd_problems(12, 120, most_work=1_000_000))),
    ],
    ids=problem_id,
)
def test_odd_problems(problem):
    """As the schedule would do them, in all classes of accuracy."""
    assert_equal(problem)


# More of what others show; every dtype and epilogue is left with enough.
MORE = {
    "a wide row",
    "three along rows of eight",
    "two rows of images",
    "turns of images",
    "resident",
    "stride 4",
    "dense rows by turns",
    "split, images",
    "three blocks",
    "NCHW, images",
    "every fourth pixel",
}


@pytest.mark.parametrize(
    ("problem", "config", "epilogue"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in MORE))
        for name, *case in cases()
    ],
)
def test_configurations(problem, config, epilogue):
    """Two multiprocessors take all tiles: rings go round."""
    walked = folded(problem)
    tiles = Geometry(walked, config).tiles
    assert config.split > 1 or tiles > grid(walked, config, FEW)
    assert_equal(problem, config, epilogue)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("name", CASES)
def test_configurations_in_all_dtypes(name, layout, dtype):
    problem, config = CASES[name]
    assert_equal(problem.replace(dtype=dtype, layout=layout), config, FULL)


@pytest.mark.parametrize(
    "case", [*drawn(1, 3, 150_000), *map(slow, drawn(2, 150))], ids=lambda case: case_id(case)
)
def test_drawn_configurations(case):
    """Nobody proposes them, but `check` allows them."""
    assert_equal(*case, FULL)


@functools.cache
def proposed(problem):
    return list(SCHEDULE.configs(problem, HOPPER))


@pytest.mark.parametrize("turn", [0, 1, *map(slow, range(2, 20))])
def test_sampled_configurations(turn):
    problem = (BASE.replace(batch=1, in_channels=24, input_size=(4, 5)), DIRECT, STAGED)[turn % 3]
    config = random.Random(turn).choice(proposed(problem))
    assert_equal(problem, config, FULL, ("normal",))


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_epilogues(epilogue):
    """By turns, as most configurations would do it; the others' are among `cases`."""
    problem = BASE.replace(batch=1, in_channels=16, dtype="bfloat16")
    assert_equal(problem, Config(1, 3, 8, turns=True), epilogue)


def test_how_outputs_are_stored():
    def way(images=False, **fields):
        g = Geometry(BASE.replace(**fields), Config(8, 2, 8, images))
        return g.staged, g.pairs, g.alignment

    for fields in ({}, dict(dtype="bfloat16"), dict(in_channels=80, out_channels=80, groups=2)):
        assert way(**fields) == (True, "channels", 16)
    assert way(dtype="float32") == (False, "channels", 8)
    assert way(groups=2) == (False, "channels", 4)
    assert way(out_channels=37) == (False, None, 2)
    for columns, pairs, alignment in ((16, "pixels", 16), (12, "pixels", 8), (9, None, 2)):
        assert way(layout="NCHW", input_size=(5, columns)) == (True, pairs, alignment)
    assert way(layout="NCHW", dtype="float32") == (False, "pixels", 8)
    assert way(images=True, layout="NCHW") == (False, None, 2)


@pytest.mark.parametrize(
    ("problem", "config"),
    [
        (STAGED, Config(1, 2, 8, turns=True)),
        (DIRECT, Config(8, 2, 2, True, dense=True)),
        (STAGED.replace(layout="NCHW"), Config(1, 2, 8, along_p=2, split=2)),
        (DIRECT.replace(dtype="float32"), Config(3, 2, 8, filter_stages=0)),
    ],
    ids=str,
)
def test_nan_and_infinity_reach_the_outputs_that_read_them_and_no_others(problem, config):
    assert_nan_and_infinity_stay_local(FORMS[problem.dtype], problem, config, FEW)


def test_tf32_is_held_to_its_own_class():
    tf32 = SCHEDULES["cuda_window_tf32"]
    problem = BASE.replace(dtype="float32", batch=1)
    assert (tf32.accuracy(problem), SCHEDULE.accuracy(BASE)) == ("tf32", "fp16")
    assert_equal(problem, Config(1, 2, 8), kinds=("normal",))


PROPOSALS = [
    BASE.replace(input_size=(4, 5)),
    DIRECT.replace(input_size=(5, 4), layout="NCHW"),
    BASE.replace(batch=9, input_size=(2, 2), dtype="float32"),
]


@pytest.mark.parametrize("problem", PROPOSALS, ids=problem_id)
def test_every_proposal_is_valid_and_so_is_the_default(problem):
    schedule = SCHEDULES[FORMS[problem.dtype]]
    found = list(schedule.configs(problem, HOPPER))
    assert len(set(found)) == len(found) > 50
    default = schedule.default(problem, HOPPER)
    costs = {config: schedule.estimate(problem, config, HOPPER) for config in found}
    assert 0 < costs[default] == min(costs.values())
    for config in (default, *found[::10]):
        assert schedule.check(config, problem, HOPPER) is None, config


def test_blocks_of_a_resident_filter_keep_to_it():
    """Every grid-th tile has the same channels, whatever their number."""
    for out_channels, config in itertools.product(
        (72, 200, 72 * 16), (Config(1, 2, 8, filter_stages=0), Config(1, 1, 8, along_m=2))
    ):
        problem = BASE.replace(batch=128, in_channels=16, out_channels=out_channels)
        g, blocks = Geometry(problem, config), grid(problem, config, HOPPER)
        assert 0 < blocks <= min(g.tiles, 132) or config.filter_stages == 0
        assert config.filter_stages or blocks % (g.groups * g.m_tiles) == 0
        assert grid(problem, config, FEW) in (2, g.groups * g.m_tiles)


BAD = {
    "images=1": (dict(images=1), "images=1: allowed are True and False"),
    "turns": (dict(turns="yes"), "turns='yes': allowed are True and False"),
    "dense": (dict(dense=0), "dense=0: allowed are True and False"),
    "tile_n": (dict(tile_n=0), "tile_n=0: allowed are whole numbers from 1"),
    "along_m": (dict(along_m=True), "along_m=True: allowed are whole numbers from 1"),
    "pixel_stages": (dict(pixel_stages=1), "pixel_stages=1: allowed are whole numbers from 2"),
    "filter_stages": (
        dict(filter_stages=1),
        "filter_stages=1: allowed are 0, for all of the filter, and 2 or more",
    ),
    "taps": (dict(taps="all"), "taps='all': allowed are 'window', 'row' and 'tap'"),
    "images": (dict(images=True), "tile_n=1: with images=True a multiple of 8"),
    "tile_w": (dict(tile_w=12), "tile_w=12: 8, or in a tile of one row a multiple of it"),
    "rows of sixteen": (dict(tile_w=16), "tile_w=16: 8, or in a tile of one row a multiple of it"),
    "dense images": (
        dict(images=True, dense=True, tile_n=16),
        "tile_n=16: with dense=True and images=True it has to be 8",
    ),
    "a matrix": (dict(tile_h=33), "tile_n=1, tile_h=33, tile_w=8: more than 256 a matrix"),
    "turns of many": (
        dict(turns=True, along_p=2), "turns=True: along_m, along_p and split have to be 1"
    ),
    "turns of a split": (
        dict(turns=True, split=2), "turns=True: along_m, along_p and split have to be 1"
    ),
    "warpgroups": (dict(along_m=3, along_p=2), "along_m=3, along_p=2: more than 4 warpgroups"),
    "threads": (dict(blocks=9), "blocks=9: 2304 threads a multiprocessor"),
    "sums": (dict(tile_n=13, tile_h=4), "blocks=1: 208 sums a thread, there is room for 192"),
    "sums of many": (
        dict(tile_h=32, blocks=2), "blocks=2: 128 sums a thread, there is room for 100"
    ),
    "split": (dict(split=3), "split=3: of 2 copies at most 8, filter_stages > 0"),
    "split of a resident filter": (
        dict(split=2, filter_stages=0), "split=2: of 2 copies at most 8, filter_stages > 0"
    ),
    "no room for sums": (
        dict(along_m=4, tile_h=14, taps="tap", filter_stages=2, split=2),
        "split=2: 94208 bytes of rings do not hold the sums",
    ),
    "shared memory": (
        dict(pixel_stages=40), "pixel_stages=40: 247552 bytes of 233472, shared memory"
    ),
    "shared memory of two": (
        dict(pixel_stages=16, blocks=2), "pixel_stages=16: 248576 bytes of 233472, shared memory"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_configurations(name):
    fields, message = BAD[name]
    config = Config(**{**vars(Config(1, 2, 8)), **fields})
    assert SCHEDULE.check(config, BASE, HOPPER) == message
    with pytest.raises(ScheduleError) as caught:
        im2win_tvm.compile(BASE, HOPPER, schedule="cuda_window", config=config)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("fields", "config", "message"),
    [
        (
            dict(stride=9, input_size=(28, 28)),
            Config(1, 2, 8),
            "stride=(9, 9), tile: steps of (1, 1, 9, 9, 1): allowed are 1 to 8",
        ),
        (
            dict(input_size=(300, 9), dilation=(130, 1)),
            Config(1, 2, 8),
            "stride=(1, 1), tile: a box over (64, 1, 10, 262, 1) elements: "
            "allowed are up to 256 of an axis",
        ),
        (
            dict(in_channels=16, out_channels=2**21, kernel_size=8, padding=4),
            Config(1, 2, 8, along_m=2),
            "along_m=2: in whole tiles the filter has 2**32 bytes or more",
        ),
    ],
)
def test_configurations_that_a_problem_refuses(fields, config, message):
    assert SCHEDULE.check(config, BASE, HOPPER) is None
    assert SCHEDULE.check(config, BASE.replace(**fields), HOPPER) == message


@pytest.mark.parametrize(
    ("form", "fields", "target", "message"),
    [
        ("cuda_window", dict(dtype="float32"), HOPPER,
         "dtype=float32: cuda_window takes float16 and bfloat16"),
        ("cuda_window_tf32", {}, HOPPER, "dtype=float16: cuda_window_tf32 takes float32"),
        ("cuda_window", {}, CudaTarget("sm_90"), "arch=sm_90: cuda_window takes sm_90a"),
        ("cuda_window", {}, CudaTarget("sm_100a"), "arch=sm_100a: cuda_window takes sm_90a"),
        ("cuda_window",
         dict(batch=1, in_channels=2, input_size=(16384, 16384), out_channels=2, stride=64), HOPPER,
         "input_shape=(1, 16384, 16384, 2): in whole vectors 2**31 elements or more"),
        ("cuda_window", dict(in_channels=30, out_channels=30, groups=2), HOPPER,
         "groups=2: cuda_window takes groups of 16 channels or more, these have 15 "
         "(cuda_depthwise takes them)"),
        ("cuda_window", dict(stride=(1, 9), input_size=(9, 28)), HOPPER,
         "stride=(1, 9), tile: steps of (1, 1, 9, 1, 1): allowed are 1 to 8"),
    ],
)  # fmt: skip
def test_refused_problems(form, fields, target, message):
    assert SCHEDULE.supports(BASE, HOPPER) is None
    assert SCHEDULES[form].supports(BASE.replace(**fields), target) == message


def test_configurations_that_a_device_is_to_run_are_valid():
    for problem, config in (*CASES.values(), *BUSY.values()):
        for dtype in FORMS:
            if problem in (case[0] for case in CASES.values()) or problem.dtype == dtype:
                schedule = SCHEDULES[FORMS[dtype]]
                assert schedule.check(config, problem.replace(dtype=dtype), HOPPER) is None


def test_pixels_are_one_long_row():
    pointwise = BASE.replace(kernel_size=1, padding=0)
    assert folded(pointwise) == pointwise.replace(batch=1, input_size=(1, 60))
    for other in (BASE, pointwise.replace(layout="NCHW"), pointwise.replace(stride=2)):
        assert folded(other) == other


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("layer", "dtype", "config"),
    [
        ("conv9", "float16", Config(1, 16, 8, turns=True, pixel_stages=2, filter_stages=0)),
        slow("conv8", "bfloat16", Config(1, 16, 8, along_m=2, pixel_stages=3, filter_stages=5)),
        slow("conv12", "float16", Config(8, 1, 7, True, along_m=2, split=4, taps="row")),
        slow("conv6", "float32", None),
    ],
)
def test_code(layer, dtype, config, tmp_path):
    """No spills; copies, operands, products and stores by the instructions that they are for."""
    problem = suites.suite("paper", 128, dtype=dtype, layout="NHWC")[layer]
    schedule = SCHEDULES[FORMS[dtype]]
    config = config or schedule.default(problem, HOPPER)
    module = schedule.build(problem, config, HOPPER, FULL)
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
    half = [] if dtype == "float32" else ["stmatrix.sync.aligned", "st.global.v4"]
    for instruction in (
        "wgmma.mma_async.sync.aligned.m64n",
        "cp.async.bulk.tensor.5d.shared::cluster.global",
        "cp.async.bulk.shared::cluster.global",
        "mbarrier.try_wait",
        "mbarrier.arrive.expect_tx",
        "setmaxnreg.dec.sync.aligned",
        "setmaxnreg.inc.sync.aligned",
        *half,
    ):
        assert instruction in ptx, instruction


def test_orders_of_taps_are_told_apart():
    """Packed filters of one shape: the taps of a stride by class, or as they are."""
    problem = ConvProblem(1, 128, (56, 56), 128, 3, 2, 1, dtype="float16", layout="NHWC")
    by_class, dense = Config(1, 2, 8), Config(1, 2, 8, dense=True)

    def prepare_hash(problem, config):
        module = lower.lower(SCHEDULE.build(problem, config, HOPPER))
        shapes = {p.name: p.shape for p in lower.function_parameters(module)["im2win_prepare"]}
        return shapes["packed"], structural_hash(module["im2win_prepare"])

    first = prepare_hash(problem, by_class)
    assert prepare_hash(problem, dense)[0] == first[0]
    assert prepare_hash(problem, dense) != first
    # Another batch, and another epilogue's tiles, change nothing.
    assert prepare_hash(problem.replace(batch=5), Config(5, 2, 8, pixel_stages=3)) == first


PATCHES = {
    "16 x 16": ConvProblem(2, 3, (16, 32), 20, (4, 16), (4, 16), dtype="float16", layout="NHWC"),
    "even": ConvProblem(2, 4, (6, 12), 24, (3, 2), (3, 2), dtype="bfloat16", layout="NHWC"),
    "tf32": ConvProblem(3, 1, (8, 16), 12, (2, 4), (2, 4), dtype="float32", layout="NHWC"),
}


@pytest.mark.parametrize("problem", PATCHES.values(), ids=PATCHES)
def test_windows_side_by_side_are_read_in_place(problem):
    """Columns of a window as channels: no copy, even of three channels."""
    walked = walk(problem)
    rows, columns = problem.kernel_size
    assert (walked.in_channels, walked.kernel_size) == (columns * problem.in_channels, (rows, 1))
    assert walked.flops == problem.flops
    assert_equal(problem, epilogue=FULL)
    for other in (
        problem.replace(layout="NCHW"),
        problem.replace(padding=((0, rows), (0, 0))),
        problem.replace(input_size=(problem.input_size[0] + 1, problem.input_size[1])),
        problem.replace(stride=(rows, columns + 1)),
        problem.replace(dilation=(1, 2)),
    ):
        assert walk(other) == other
