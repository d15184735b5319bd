"""MetaSchedule over the im2win expressions: traces as configurations, and templates' tiles."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import tvm
from emulated import assert_right
from metaschedule_machinery import (
    machinery,
    named_handlers,  # noqa: F401
    tensor_core_trace,
)
from tuning_records import CPU, PROBLEM, make, write
from tvm import s_tir
from tvm.ir import IRModule

import im2win_tvm
from im2win_tvm import lower, reference, tensors, traces
from im2win_tvm.bench import baselines, timing
from im2win_tvm.bench.run import run
from im2win_tvm.epilogue import Epilogue
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES, ScheduleError
from im2win_tvm.schedules import metaschedule as schedules
from im2win_tvm.select import select, supporting
from im2win_tvm.target import CudaTarget
from im2win_tvm.tensor_intrinsics import building
from im2win_tvm.traces import plain
from im2win_tvm.tuning import lookup, metaschedule
from im2win_tvm.tuning.measuring import TuningError
from im2win_tvm.tuning.session import FINALISTS, Session
from im2win_tvm.tuning.templates import CpuBlockedTemplate

NAME = "cpu_metaschedule"
SCHEDULE = SCHEDULES[NAME]
BRIEF = timing.Limits(warmup=0.001, seconds=0.001, least=3, most=5)
ODD = ConvProblem(2, 6, (9, 8), 10, 3, stride=2, padding=((0, 1), (2, 1)), groups=2)


def _trace(problem, change=lambda sch: None):
    """A trace that splits the rows of the convolution, and what `change` does to it."""
    sch = s_tir.Schedule(IRModule({"main": schedules.function(problem)}))
    loops = sch.get_loops(sch.get_sblock("conv"))
    sch.parallel(loops[0])
    sch.split(loops[2], [None, 2])
    change(sch)
    return schedules.Config(json.dumps(plain(sch.trace.as_json())))


@pytest.fixture(autouse=True)
def _by_hand(request, monkeypatch):
    """Unless `as_it_is` is asked for, traces made by hand are taken, too."""
    known = schedules._refusal
    known.cache_clear()
    if "as_it_is" not in request.fixturenames:
        monkeypatch.setattr(schedules, "refusal", lambda *_: None)
    yield
    known.cache_clear()


@pytest.fixture
def as_it_is():
    """See `_by_hand`."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv(lookup.VARIABLE, str(tmp_path / "logs"))
    return tmp_path / "logs"


def _record(us, problem=PROBLEM):
    return make(us, problem, schedule=NAME, config=asdict(_trace(problem)))


@pytest.mark.parametrize(
    "problem",
    [ODD, ODD.replace(layout="NHWC", groups=1), PROBLEM.replace(dtype="float16", dilation=(1, 2))],
    ids=str,
)
def test_a_trace_computes_the_convolution(problem):
    """Also with an epilogue, which the search did not see."""
    kernel = im2win_tvm.compile(
        problem, CPU, schedule=NAME, config=_trace(problem), bias=True, activation="relu"
    )
    made = tensors.fill(problem, "normal", 1)
    bias = np.linspace(-1, 1, problem.out_channels).astype(problem.dtype)
    out = tensors.poisoned(problem.output_shape, problem.dtype)
    kernel(made.x, made.w, bias, out=out)
    axis = -1 if problem.channels_last else 1
    shape = [problem.out_channels if i == axis % 4 else 1 for i in range(4)]
    expected = reference.conv2d(made.x, made.w, problem) + bias.astype("float64").reshape(shape)
    error = np.abs(out - np.maximum(expected, 0)).max()
    assert error < (1e-5 if problem.dtype == "float32" else 2e-2)


def test_cuda_pointers_keep_the_alignment_of_vectors():
    sch = s_tir.Schedule(IRModule({"main": schedules.function(PROBLEM)}))
    for block in ("im2win", "conv", "y"):
        sch.bind(sch.get_loops(sch.get_sblock(block))[0], "blockIdx.x")
    config = schedules.Config(json.dumps(plain(sch.trace.as_json())))
    module = SCHEDULES["cuda_metaschedule"].build(PROBLEM, config, CudaTarget("sm_90"))
    found = lower.function_parameters(lower.lower(module))["im2win_conv"]
    assert {p.name: p.alignment for p in found} == {"x": 16, "packed": 64, "y": 16}


def _annotate(key, value=1):
    def change(sch):
        sch.annotate(sch.get_loops(sch.get_sblock("y"))[0], key, value)

    return change


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (schedules.Config(""), "trace='': cpu_metaschedule has no heuristic"),
        (schedules.Config("{"), "trace: JSONDecodeError"),
        (schedules.Config("[]"), "trace: ValueError"),
        (schedules.Config("3"), "trace: TypeError"),
        (schedules.Config("[" * 100_000), "trace: RecursionError"),
        (schedules.Config('[[["EnterPostproc", [], [], []]], []]'), "trace: its steps are none"),
        (_trace(PROBLEM), "trace: "),
        (_trace(PROBLEM, _annotate("pragma_import_c", "int f;")), "trace: "),
        (schedules.Config(3), "trace=3: allowed: the text of a trace"),
    ],
    ids=range(9),
)
def test_a_trace_is_refused(config, reason, as_it_is):
    assert reason in SCHEDULE.check(config, PROBLEM, CPU)
    with pytest.raises(ScheduleError):
        SCHEDULE.build(PROBLEM, config, CPU)


def test_without_a_record_it_takes_no_part(place):
    place.mkdir()
    assert NAME not in supporting(PROBLEM, CPU)
    assert select(PROBLEM, CPU).schedule.name == "cpu_blocked"
    with pytest.raises(ScheduleError, match=r"no tuning record for .*, and no heuristic"):
        select(PROBLEM, CPU, NAME)
    assert select(PROBLEM, CPU, NAME, _trace(PROBLEM)).origin.kind == "given"


@pytest.mark.parametrize(("theirs", "winner"), [(9.0, NAME), (11.0, "cpu_blocked")])
def test_the_faster_record_wins_whatever_found_it(place, theirs, winner):
    write(place, _record(theirs), name=NAME)
    write(place, make(10.0))
    choice = select(PROBLEM, CPU)
    assert (choice.schedule.name, choice.origin.kind) == (winner, "record")
    kernel = im2win_tvm.compile(PROBLEM, CPU)
    assert kernel.metadata["schedule"]["name"] == winner
    made = tensors.fill(PROBLEM, "normal", 2)
    error = np.abs(kernel(made.x, made.w) - reference.conv2d(made.x, made.w, PROBLEM)).max()
    assert error < 1e-5


def test_a_trace_that_is_no_faster_is_not_replayed(place, monkeypatch):
    monkeypatch.setattr(schedules, "_refusal", lambda *_: pytest.fail("replayed"))
    write(place, _record(10.0), name=NAME)
    write(place, make(10.0))
    choice = select(PROBLEM, CPU)
    assert choice.schedule.name == "cpu_blocked"
    assert [miss.reason for miss in choice.missed] == [
        "its 10.00 us are no less than cpu_blocked's 10.00"
    ]


def test_a_wrong_output_excludes_a_trace_that_was_right_once(place):
    """Though the right record says that it is the fastest."""
    write(place, _record(1.0), replace(_record(2.0), passed=False, times={}), name=NAME)
    write(place, make(10.0))
    choice = select(PROBLEM, CPU)
    assert (choice.schedule.name, choice.missed[0].reason) == (
        "cpu_blocked",
        "its output was wrong",
    )


def test_a_record_whose_trace_is_refused_is_a_miss(place, as_it_is):
    spoilt = asdict(_trace(PROBLEM, _annotate("pragma_import_c", "int f;")))
    write(place, make(1.0, schedule=NAME, config=spoilt), name=NAME)
    choice = select(PROBLEM, CPU)
    assert choice.origin.kind == "heuristic"
    assert choice.missed[0].reason.startswith("config: trace: ")


def test_bench_shows_it_beside_the_others(place):
    write(place, _record(9.0), name=NAME)
    entries = baselines.implementations(CPU, ["metaschedule"], ["cpu_blocked"])
    layers = run({"it": PROBLEM, "other": ODD}, CPU, entries, BRIEF)["layers"]
    (ours, searched), (_, gap) = (layer["implementations"] for layer in layers)
    assert (ours["family"], searched["family"]) == ("im2win", "metaschedule")
    assert (ours["status"], searched["status"], gap["status"]) == ("ok", "ok", "absent")
    assert "scripts/tune_metaschedule.py makes records" in gap["reason"]


@pytest.mark.slow
def test_a_search_ends_in_records_that_selection_takes(place, monkeypatch, as_it_is):
    monkeypatch.setattr("im2win_tvm.tuning.session.SEARCH", BRIEF)
    with Session(CPU, place, 1, BRIEF) as session:
        result = metaschedule.tune(session, PROBLEM, CPU, 2, 2, **machinery())
    assert result.tried > 0
    assert (result.errors, result.wrong) == ({}, [])
    assert all(record.passed for record in result.records)
    choice = select(PROBLEM, CPU)
    assert (choice.schedule.name, choice.origin.kind) == (NAME, "record")
    assert asdict(choice.config) == result.best().config


@pytest.mark.parametrize(
    ("dtype", "arch"),
    [
        ("float32", "sm_90"),
        pytest.param("float16", "sm_90", marks=pytest.mark.slow),
        pytest.param("bfloat16", "sm_75", marks=pytest.mark.slow),
    ],
)
def test_what_rules_for_cuda_find_computes_the_convolution(dtype, arch, monkeypatch, as_it_is):
    """On CUDA cores; so is bfloat16 where there is no wmma for it."""
    described = {"kind": "cuda", "arch": "sm_90", "thread_warp_size": 32}
    described |= {"max_shared_memory_per_block": 48 * 1024, "max_threads_per_block": 1024}
    gpu = tvm.target.Target(described | {"registers_per_block": 65536}, host="llvm")
    monkeypatch.setattr(metaschedule, "tvm_target_here", lambda target: gpu)
    monkeypatch.setattr(metaschedule, "choose_cuda_compiler", lambda: None)
    problem = ODD.replace(dtype=dtype)
    (config, *_) = metaschedule.found(problem, CudaTarget(arch), 2, 2, **machinery())
    assert "threadIdx.x" in config.trace
    assert_right("cuda_metaschedule", problem, config, Epilogue(True, True, "relu"))


# 768 windows, 45 products and 37 filters, of which fragments of 16 leave a part over.
RAGGED = ConvProblem(
    3, 5, (33, 15), 37, 3, stride=(2, 1), padding=((0, 1), (2, 1)), dtype="float16"
)  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        ("float16", "NHWC"),
        ("bfloat16", "NHWC"),
        pytest.param("float16", "NCHW", marks=pytest.mark.slow),
        pytest.param("bfloat16", "NCHW", marks=pytest.mark.slow),
    ],
)
def test_what_rules_for_tensor_cores_find_computes_the_convolution(dtype, layout):
    """With plain loops in the place of TVM's intrinsics, which a processor has not."""
    problem = RAGGED.replace(dtype=dtype, layout=layout)
    (steps, decisions) = tensor_core_trace(problem)
    trace = json.dumps([steps, decisions])
    schedule, gpu = SCHEDULES["cuda_metaschedule"], CudaTarget("sm_90")
    plain = [step for step in steps if step[0] != "Tensorize"]
    assert len(steps) - len(plain) == 5  # zeros, both operands, products, output
    config = schedules.Config(json.dumps([plain, decisions]))
    epilogue = Epilogue(True, True, "relu")
    assert_right("cuda_metaschedule", problem, config, epilogue, ["normal"])
    module = schedule.build(problem, schedules.Config(trace), gpu, epilogue)
    source = lower.cuda_source(lower.lower(module), gpu)
    assert "wmma::mma_sync" in source
    operands = {"float16": "half", "bfloat16": "nv_bfloat16"}[dtype]
    assert f"wmma::matrix_a, 16, 16, 16, {operands}, " in source
    given = {"relax.backend.use_cuda_graph": True}
    with tvm.transform.PassContext(opt_level=1, config=given), building(module):
        here = tvm.transform.PassContext.current()
        assert here.opt_level == 1
        assert dict(here.config) == given | {"tirx.merge_static_smem": True}


def test_rules_in_bfloat16_are_those_in_float16():
    """But for what TVM leaves out in bfloat16: vectors of three, and aligned rows."""

    def sketches(dtype):
        problem = RAGGED.replace(dtype=dtype, layout="NHWC")
        _, found = traces._sketches(
            schedules.function(problem),
            traces.gpu(),
            lambda: traces.rules(problem, CudaTarget("sm_90")),
        )
        return {json.dumps([_named_alike(s) for s in f if s[0] != "StorageAlign"]) for f in found}

    theirs, ours = sketches("float16"), sketches("bfloat16")
    assert "wmma_sync_16x16x16_f16f16f32" in str(theirs)
    assert ours == theirs


def _named_alike(step):
    """A step in float16, with any width of a vector but 3 as likely as it is."""
    if step[0] == "SampleCategorical":
        widths = [width for width in step[2][0] if width != 3]
        return [*step[:2], widths, step[3]]
    return json.loads(json.dumps(step).replace("bf16", "f16"))


def test_functions_without_fragments_are_built_as_ever():
    before = tvm.transform.PassContext.current()
    with building(IRModule({"main": schedules.function(PROBLEM)})):
        assert tvm.transform.PassContext.current().same_as(before)


def test_a_search_of_a_template_finds_configurations_of_its_schedule():
    problem = PROBLEM.replace(out_channels=64, input_size=(24, 24))
    found = metaschedule.found(problem, CPU, 8, 8, space="cpu_blocked", **machinery())
    assert 0 < len(found) <= FINALISTS
    for config in found:
        assert SCHEDULES["cpu_blocked"].check(config, problem, CPU) is None


def test_a_template_decides_tiles():
    problem = PROBLEM.replace(out_channels=64, input_size=(24, 24))
    start = replace(
        SCHEDULES["cpu_blocked"].default(problem, CPU), tile_rows=2, tile_columns=4, block_rows=8
    )
    template = CpuBlockedTemplate(problem, CPU, start)
    configs = set()
    for seed in range(12):
        sch = s_tir.Schedule(IRModule({"main": template.function}), seed=seed + 1)
        template._design(sch)
        config = template.config(sch.trace)
        if config is not None:
            configs.add(config)
            assert SCHEDULES["cpu_blocked"].check(config, problem, CPU) is None
    assert len(configs) > 2


def test_what_cannot_be_searched_is_refused(place):
    with Session(CPU, place, 1, BRIEF) as session:
        with pytest.raises(TuningError, match="space='no': allowed: rules, cpu_blocked"):
            metaschedule.tune(session, PROBLEM, CPU, space="no")
        with pytest.raises(TuningError, match="dtype=bfloat16"):
            metaschedule.tune(session, PROBLEM.replace(dtype="bfloat16"), CPU)
        with pytest.raises(TuningError, match="none of 2 candidates ran"):
            metaschedule.tune(session, PROBLEM, CPU, 2, 2, **machinery("no compiler"))
