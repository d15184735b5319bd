"""Few input channels on tensor cores on a machine without a GPU: simulated, and through nvcc."""

import dataclasses
import functools

import pytest
from emulated import assert_nan_and_infinity_stay_local, assert_right
from problems import odd_problems, problem_id
from thin_cases import BASE, CASES, EPILOGUES, FEW, FORMS, FULL, case, case_id, cases, config, drawn

import im2win_tvm
from im2win_tvm import lower, suites, toolchain
from im2win_tvm.epilogue import NONE
from im2win_tvm.schedules import SCHEDULES, ScheduleError, cuda_thin_tiles
from im2win_tvm.schedules.cuda_thin_tiles import Config, Geometry
from im2win_tvm.target import CudaTarget

HOPPER = CudaTarget("sm_90a")
SCHEDULE = SCHEDULES["cuda_thin"]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def assert_equal(problem, chosen=None, epilogue=NONE, kinds=("integer",)):
    assert_right(FORMS[problem.dtype], problem, chosen, epilogue, kinds, FEW)


def thin(problems):
    """The problems in all dtypes by turns, of few channels."""
    for turn, problem in enumerate(problems):
        channels, dtype = (1, 3, 4, 5, 12)[turn % 5], tuple(FORMS)[turn % 3]
        problem = problem.replace(groups=1, in_channels=channels, dtype=dtype)
        if SCHEDULES[FORMS[problem.dtype]].supports(problem, FEW) is None:
            yield problem


@pytest.mark.parametrize(
    "problem",
    [
        *thin(odd_problems(31, 8, most_work=100_000)),
        *map(slow, thin(odd_problems(32, 120, most_work=1_000_000))),
    ],
    ids=problem_id,
)
def test_odd_problems(problem):
    """As the schedule would do them, in all classes of accuracy."""
    assert_equal(problem)


@pytest.mark.parametrize(
    ("problem", "chosen", "epilogue"),
    [pytest.param(*each, id=name) for name, *each in cases()],
)
def test_configurations(problem, chosen, epilogue):
    """Two multiprocessors take all tiles: rings go round."""
    assert_equal(problem, chosen, epilogue)


@pytest.mark.parametrize("by_copies", [True, False])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("stride 4, 11x11", "float32"),
        ("stride 1", "float16"),
        pytest.param("7x7 stem", "bfloat16", marks=pytest.mark.slow),
        pytest.param("dilation", "float16", marks=pytest.mark.slow),
        pytest.param("many small images", "float32", marks=pytest.mark.slow),
        pytest.param("one channel, filled up", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_windows_wrap_round_where_no_row_has_room_twice(name, dtype, by_copies, monkeypatch):
    problem, chosen = case(*CASES[name], dtype, "NHWC")
    chosen = dataclasses.replace(chosen, by_copies=by_copies)
    room = Geometry(problem, chosen).shared_bytes - 1
    monkeypatch.setattr(cuda_thin_tiles, "BLOCK_BYTES", room)
    assert Geometry(problem, chosen).wraps and Geometry(problem, chosen).fits
    assert_equal(problem, chosen, FULL)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("name", CASES)
def test_configurations_in_all_dtypes(name, layout, dtype):
    assert_equal(*case(*CASES[name], dtype, layout), FULL)


@pytest.mark.parametrize("chosen", drawn(1, 4, 100_000), ids=case_id)
def test_drawn_configurations(chosen):
    """Nobody proposes them, but `check` allows them."""
    assert_equal(*chosen, FULL)


@functools.cache
def more():
    """Drawn by the tests that are slow: it takes seconds, of every process that runs tests."""
    return list(drawn(2, 200))


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(200))
def test_more_drawn_configurations(turn):
    assert_equal(*more()[turn], FULL)


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_epilogues(epilogue):
    """In NHWC here; in NCHW they are among `cases`."""
    problem = BASE.replace(batch=1, input_size=(9, 11), dtype="bfloat16")
    assert_equal(problem, config(problem), epilogue)


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        (dict(kernel_size=5, padding=2, layout="NCHW"), {}),
        (dict(stride=1, padding=0, dtype="bfloat16"), dict(rows=2)),
        (dict(stride=1), dict(channels=4)),
        (dict(dtype="float32", stride=1), dict(rows=3)),
    ],
    ids=str,
)
def test_nan_and_infinity_reach_the_outputs_that_read_them_and_no_others(fields, chosen):
    """Words that are half another window's, and those that fill up K, are masked."""
    problem = BASE.replace(**{"batch": 1, "input_size": (11, 13), **fields})
    assert_nan_and_infinity_stay_local(
        FORMS[problem.dtype], problem, config(problem, **chosen), FEW
    )


def test_tf32_is_held_to_its_own_class():
    problem = BASE.replace(dtype="float32")
    assert SCHEDULES["cuda_thin_tf32"].accuracy(problem) == "tf32"
    assert SCHEDULE.accuracy(BASE) == "fp16"
    assert_equal(problem, kinds=("normal",))


PROPOSALS = [
    BASE,
    BASE.replace(stride=1, layout="NCHW", out_channels=300),
    BASE.replace(dtype="float32", input_size=(224, 224), kernel_size=11, stride=4, batch=128),
]


@pytest.mark.parametrize("problem", PROPOSALS, ids=problem_id)
def test_every_proposal_is_valid_and_so_is_the_default(problem):
    schedule = SCHEDULES[FORMS[problem.dtype]]
    found = list(schedule.configs(problem, HOPPER))
    assert len(set(found)) == len(found) > 5
    default = schedule.default(problem, HOPPER)
    costs = {each: schedule.estimate(problem, each, HOPPER) for each in found}
    assert 0 < costs[default] == min(costs.values())
    for each in (default, *found):
        assert schedule.check(each, problem, HOPPER) is None, each


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_first_layers_have_a_configuration(dtype, layout):
    problems = [
        *(suites.layer("paper", f"conv{i}", 128, dtype, layout) for i in (1, 2, 3, 7)),
        suites.layer("resnet50", "conv1", 32, dtype, layout),
        suites.layer("vgg16", "conv1_1", 1, dtype, layout),
    ]
    schedule = SCHEDULES[FORMS[dtype]]
    for problem in problems:
        assert schedule.supports(problem, HOPPER) is None
        assert schedule.check(schedule.default(problem, HOPPER), problem, HOPPER) is None


@pytest.mark.parametrize("name", ["conv1", "conv2"])
def test_all_channels_stay_in_tf32_though_rows_have_no_room_twice(name):
    problem = suites.layer("paper", name, 128, "float32", "NHWC")
    chosen = SCHEDULES["cuda_thin_tf32"].default(problem, HOPPER)
    assert chosen.block_n == 96 and Geometry(problem, chosen).wraps and not chosen.pairs


BAD = {
    "block_n": (dict(block_n=20), "block_n=20: allowed are multiples of 8 up to 256"),
    "block_n, large": (dict(block_n=264), "block_n=264: allowed are multiples of 8 up to 256"),
    "warpgroups": (dict(warpgroups=5), "warpgroups=5: allowed are 1 to 4"),
    "warpgroups, none": (
        dict(warpgroups=0), "warpgroups=0: allowed are whole numbers from 1"
    ),
    "channels": (dict(channels=2), "channels=2: allowed are 3 and 4"),
    "channels, more": (dict(channels=5), "channels=5: allowed are 3 and 4"),
    "rows": (dict(rows=33), "rows=33: allowed are 1 to 32"),
    "stages": (dict(stages=3), "stages=3: a tile needs 16"),
    "steps": (
        dict(block_n=256, warpgroups=3),
        "steps=2: 128 sums and 16 operands a thread, there is room for 104",
    ),
    "producers": (dict(producers=3), "producers=3: allowed are 1 and 2"),
    "turns": (dict(turns=1), "turns=1: allowed are True and False"),
    "by_copies": (dict(by_copies=0), "by_copies=0: allowed are True and False"),
    "blocks": (dict(blocks=6), "blocks=6: 2304 threads a multiprocessor"),
    "blocks=True": (dict(blocks=True), "blocks=True: allowed are whole numbers from 1"),
    "shared memory": (
        dict(stages=2000), "block_n=40, stages=2000: {} bytes of 233472, shared memory"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_configurations(name):
    fields, message = BAD[name]
    chosen = Config(**{**vars(config(BASE)), **fields})
    if "{}" in message:
        message = message.format(Geometry(BASE, chosen).shared_bytes + 1024)
    assert SCHEDULE.check(chosen, BASE, HOPPER) == message
    with pytest.raises(ScheduleError) as caught:
        im2win_tvm.compile(BASE, HOPPER, schedule="cuda_thin", config=chosen)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("form", "fields", "target", "message"),
    [
        ("cuda_thin", dict(dtype="float32"), HOPPER,
         "dtype=float32: cuda_thin takes float16 and bfloat16"),
        ("cuda_thin_tf32", {}, HOPPER, "dtype=float16: cuda_thin_tf32 takes float32"),
        ("cuda_thin", {}, CudaTarget("sm_90"), "arch=sm_90: cuda_thin takes sm_90a"),
        ("cuda_thin", dict(groups=3, out_channels=42), HOPPER,
         "groups=3: cuda_thin takes 1 (cuda_simt takes any)"),
        ("cuda_thin", dict(in_channels=13), HOPPER,
         "in_channels=13: cuda_thin takes up to 12 (cuda_window takes any)"),
        ("cuda_thin", dict(in_channels=12, kernel_size=40, input_size=(300, 300)), HOPPER,
         "block_n=8, stages={}: {} bytes of 233472, shared memory"),
    ],
)  # fmt: skip
def test_refused_problems(form, fields, target, message):
    assert SCHEDULE.supports(BASE, HOPPER) is None
    reason = SCHEDULES[form].supports(BASE.replace(**fields), target)
    start, _, end = message.partition("{}")
    assert reason.startswith(start) and reason.endswith(end.rpartition("{}")[2])


def test_second_copies_of_rows_are_put_together_by_funnel_shifts():
    """The code, which the simulator does not make: loops over copies and words are unrolled."""
    problem = BASE.replace(stride=1, padding=0)
    chosen = config(problem)
    assert Geometry(problem, chosen).copies == 2
    source = lower.cuda_source(lower.lower(SCHEDULE.build(problem, chosen, HOPPER, NONE)), HOPPER)
    assert "shf.r.wrap.b32" in source


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("layer", "dtype", "layout"),
    [
        ("conv1", "float16", "NHWC"),
        slow("conv3", "bfloat16", "NCHW"),
        slow("conv7", "float16", "NHWC"),
        slow("conv3", "float32", "NHWC"),
    ],
)
def test_code(layer, dtype, layout, tmp_path):
    """No spills, and operands, products and stores by the instructions that they are for."""
    problem = suites.suite("paper", 128, dtype=dtype, layout=layout)[layer]
    schedule = SCHEDULES[FORMS[dtype]]
    module = schedule.build(problem, schedule.default(problem, HOPPER), HOPPER, FULL)
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
    by_layout = {
        "NHWC": ["st.global.L1::no_allocate.v4"],
        "NCHW": ["bar.sync", "prefetch.global.L2"],
    }
    if dtype != "float32" and layout == "NHWC":
        by_layout[layout].append("shf.r.wrap.b32")
    for instruction in (
        "wgmma.mma_async.sync.aligned.m64n",
        "cp.async.bulk.shared::cluster.global",
        "mbarrier.try_wait",
        "setmaxnreg.dec.sync.aligned",
        "setmaxnreg.inc.sync.aligned",
        *by_layout[layout],
    ):
        assert instruction in ptx, instruction
