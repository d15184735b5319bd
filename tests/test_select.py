"""Selection: a tuning record where one counts, the heuristic otherwise, and the reasons why."""

import json
import os
import shutil
from dataclasses import asdict, replace

import pytest
from tuning_records import CPU, H100, PROBLEM, failed, make, write
from typer.testing import CliRunner

import im2win_tvm
from im2win_tvm import cuda_driver
from im2win_tvm.cli import app
from im2win_tvm.schedules import SCHEDULES, ScheduleError
from im2win_tvm.select import select, supporting
from im2win_tvm.target import CudaTarget, resolve
from im2win_tvm.tuning import lookup

HEURISTIC = SCHEDULES["cpu_blocked"].default(PROBLEM, CPU)
OTHER = {"unroll": 2}


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Two places of records, empty at first, and nothing that ships."""
    first, second = tmp_path / "first", tmp_path / "second"
    for place in (first, second):
        place.mkdir()
    monkeypatch.setenv(lookup.VARIABLE, os.pathsep.join(map(str, (first, second))))
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path / "tuning_logs")
    return first, second


@pytest.fixture(autouse=True)
def without_models(monkeypatch):
    """What is recorded here has nothing to do with what models say."""
    for schedule in SCHEDULES.values():
        monkeypatch.setattr(type(schedule), "microseconds", lambda *_: None)


@pytest.fixture
def place(places):
    return places[0]


def _simt(us, schedule="cuda_simt", target=H100, **fields):
    return make(us, target=target, schedule=schedule, **fields)


def test_without_records_the_heuristic_decides():
    choice = select(PROBLEM, CPU)
    assert choice.config == HEURISTIC
    assert str(choice.origin) == "heuristic"
    assert choice.missed == ()


def test_models_of_the_time_choose_among_schedules(monkeypatch):
    """Without records; one without a model keeps its place, and loses it to none.

    Those with an explicit transform have none, and are not asked.
    """
    supported = supporting(PROBLEM, H100).values()
    schedules = [s for s in supported if not getattr(s, "explicit", False)]
    first, second = schedules
    assert len(supported) > len(schedules)

    def times(*microseconds):
        for schedule, time in zip(schedules, microseconds, strict=False):
            monkeypatch.setattr(type(schedule), "microseconds", lambda self, *_: given[self.name])
            given[schedule.name] = time
        choice = select(PROBLEM, H100)
        assert choice.config == choice.schedule.default(PROBLEM, H100)
        assert str(choice.origin) == "heuristic"
        return choice

    given = dict.fromkeys((schedule.name for schedule in supported), None)
    assert times(None, 1.0).schedule is first
    assert times(2.0, None).schedule is first
    choice = times(2.0, 1.0)
    assert choice.schedule is second
    assert choice.rejected[first.name] == f"2.0 us predicted, {second.name} 1.0"
    assert times(2.0, 3.0).rejected[second.name] == f"3.0 us predicted, {first.name} 2.0"


def test_the_fastest_record_is_taken(place):
    path = write(place, make(20.0), make(10.0, changed=OTHER), make(15.0, changed={"unroll": 3}))
    choice = select(PROBLEM, CPU)
    assert choice.config == replace(HEURISTIC, **OTHER)
    assert (choice.origin.kind, choice.origin.line) == ("record", 2)
    assert choice.origin.file == str(path)
    assert choice.origin.time_us == 10.0
    assert f"record {path}:2, 10.00 us on " in str(choice.origin)


def test_less_than_a_percent_is_no_reason_to_leave_the_heuristic(place):
    write(place, make(20.0), make(19.9, changed=OTHER))
    assert select(PROBLEM, CPU).config == HEURISTIC
    write(place, make(19.7, changed={"unroll": 3}))
    assert select(PROBLEM, CPU).config == replace(HEURISTIC, unroll=3)


def test_times_of_another_day_do_not_count_against_the_heuristic(place):
    """The first two were measured together, faster than all of a later day."""
    write(place, make(10.0), make(10.1, changed=OTHER), make(11.0))
    choice = select(PROBLEM, CPU)
    assert (choice.config, choice.origin.time_us) == (HEURISTIC, 11.0)
    write(place, make(10.6, changed={"unroll": 3}))
    assert select(PROBLEM, CPU).config == replace(HEURISTIC, unroll=3)


def test_each_is_compared_with_the_heuristic_of_its_session(place):
    """Where two sessions meet in a log, the other one's may be the nearer line."""
    first, second = "2026-11-01T10:00:00+00:00", "2026-11-02T10:00:00+00:00"
    write(
        place,
        replace(make(11.1, changed={"unroll": 3}), date=first),
        replace(make(11.0), date=first),
        replace(make(10.45, changed=OTHER), date=second),
        replace(make(10.47, changed={"unroll": 4}), date=second),
        replace(make(10.46), date=second),
    )
    choice = select(PROBLEM, CPU)
    assert (choice.config, choice.origin.line) == (HEURISTIC, 5)


def test_records_of_another_gpu_are_not_compared_with_the_heuristic_of_this_one(place):
    """Borrowed: the other GPU's heuristic says nothing of this one's configurations."""
    write(place, _simt(10.0, device="NVIDIA A"), name="cuda_simt")
    write(place, _simt(12.0, device="NVIDIA B"), name="cuda_simt")
    write(place, _simt(10.5, device="NVIDIA C", changed={"vector": 1}), name="cuda_simt")
    choice = select(PROBLEM, H100)
    assert (choice.origin.device, choice.origin.time_us) == ("NVIDIA A", 10.0)


def test_what_ships_is_named_without_the_way_to_it(tmp_path):
    write(tmp_path / "tuning_logs", make(changed=OTHER))
    choice = select(PROBLEM, CPU)
    assert choice.config == replace(HEURISTIC, **OTHER)
    assert choice.origin.file.startswith("tuning_logs" + os.sep)


def test_another_compiler_makes_no_record_stale(place):
    write(place, make(changed=OTHER, versions=make().versions | {"nvcc": "1.0"}))
    assert select(PROBLEM, CPU).config == replace(HEURISTIC, **OTHER)


def test_a_given_configuration_outweighs_records(place):
    write(place, make(changed=OTHER))
    for config in ({}, {"unroll": 1}, HEURISTIC):
        choice = select(PROBLEM, CPU, "cpu_blocked", config)
        assert choice.config == HEURISTIC
        assert str(choice.origin) == "given"


def test_an_uneven_padding_that_computes_the_same_is_the_same_problem(place):
    one = PROBLEM.replace(padding=((1, 1), (1, 1)), stride=2)
    same = one.replace(padding=((1, 2), (1, 1)))
    assert one.output_size == same.output_size
    assert one != same
    write(place, make(problem=one, changed=OTHER))
    assert select(same, CPU).origin.kind == "record"


@pytest.mark.parametrize(
    "changes",
    [dict(batch=2), dict(layout="NHWC"), dict(dtype="float16"), dict(stride=2)],
)
def test_other_problems_are_other_problems(place, changes):
    write(place, make(changed=OTHER))
    choice = select(PROBLEM.replace(**changes), CPU)
    assert str(choice.origin) == "heuristic"
    assert choice.missed == ()


def _versions(**changes):
    return make().versions | changes


MISSES = {
    "schedule": (dict(schedule="gone"), "schedule='gone': there is no such schedule"),
    "kind": (dict(target={"kind": "cuda", "arch": "sm_90"},
                  times={"cold": make().times["warm"]}), "kind='cuda': here it is 'llvm'"),
    "arch": (dict(target={"kind": "llvm", "arch": "vax"}), "arch='vax': here it is"),
    "TVM": (dict(versions=_versions(**{"apache-tvm": "0.1"})), "apache-tvm='0.1': here it is"),
    "no TVM": (dict(versions={"code": make().versions["code"]}), "apache-tvm=None: here it is"),
    "code": (dict(versions=_versions(code="0123")), "code='0123': here it is"),
    "unknown field": (dict(config=make().config | {"b": 1}), "config: field 'b' is unknown"),
    "missing field": (dict(config={"lanes": 1}), "config: field 'vectors' is missing"),
    "wrong type": (dict(config=make().config | {"unroll": 1.0}), "unroll=1.0: allowed: int"),
    "truth": (dict(config=make().config | {"unroll": True}), "unroll=True: allowed: int"),
    "text": (dict(config=make().config | {"unroll": "\x1b]0;"}), "unroll='\\x1b]0;': allowed: int"),
    "refused": (dict(config=make().config | {"lanes": 3}), "config: lanes=3: a power of two"),
    "wrong output": (dict(passed=False, times={}), "its output was wrong"),
    "no output": (dict(passed=False, times={}, error="hangs"), "it was not measured: 'hangs'"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), MISSES.values(), ids=MISSES)
def test_misses(place, changes, reason):
    path = write(place, replace(make(changed=OTHER), **changes), make(99.0, changed=OTHER))
    if "its output was wrong" in reason:  # another configuration, or it would count against that
        path.write_bytes(failed().line() + make(99.0, changed=OTHER).line())
    choice = select(PROBLEM, CPU)
    ((where, why),) = choice.missed
    assert where == f"{path}:1"
    assert reason in why
    assert why.isprintable()
    # The good record beside it is found all the same.
    assert choice.origin.line == 2


def test_a_record_of_another_device_in_the_wrong_folder(place):
    path = write(place, make())
    path.write_bytes(make(device="Another").line())
    choice = select(PROBLEM, CPU)
    assert str(choice.origin) == "heuristic"
    assert choice.missed[0].reason.startswith("device='Another': here it is ")


def test_a_schedule_that_raises_is_a_miss(place, monkeypatch):
    write(place, make(changed=OTHER))

    right = SCHEDULES["cpu_blocked"].check

    def check(config, problem, target):
        if config.unroll == 2:
            raise TypeError("'<' not supported")
        return right(config, problem, target)

    monkeypatch.setattr(SCHEDULES["cpu_blocked"], "check", check)
    choice = select(PROBLEM, CPU)
    assert str(choice.origin) == "heuristic"
    assert "TypeError" in choice.missed[0].reason


def test_hostile_logs_are_misses(place, tmp_path, monkeypatch):
    """Whatever lies there, the heuristic is what is left."""
    folder = write(place, b"{" * 30_000 + b"\n\x00\xff\n", b'{"format":' + b"9" * 5000).parent
    (folder / "folder.jsonl").mkdir()
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "text.txt").write_bytes(make().line())
    choice = select(PROBLEM, CPU)
    assert choice.config == HEURISTIC
    assert len(choice.missed) == 3
    assert all(miss.reason.startswith("not JSON") for miss in choice.missed)


def test_an_absent_place_is_a_miss(monkeypatch, tmp_path):
    monkeypatch.setenv(lookup.VARIABLE, f"{tmp_path / 'absent'}{os.pathsep}")
    (miss,) = select(PROBLEM, CPU).missed
    assert miss == (str(tmp_path / "absent"), "IM2WIN_TUNING_LOGS: no such folder")


def test_the_first_place_with_a_usable_record_decides(places):
    first, second = places
    write(first, replace(make(1.0), versions={}))
    write(second, make(5.0, changed=OTHER))
    assert select(PROBLEM, CPU).config == replace(HEURISTIC, **OTHER)
    write(first, make(50.0, changed={"unroll": 3}))
    assert select(PROBLEM, CPU).config == replace(HEURISTIC, unroll=3)


def test_a_full_measurement_outweighs_a_search(place):
    write(place, make(5.0, changed=OTHER, protocol="search"), make(9.0))
    assert select(PROBLEM, CPU).config == HEURISTIC
    shutil.rmtree(place)
    write(place, make(5.0, changed=OTHER, protocol="search"), make(9.0, protocol="search"))
    assert select(PROBLEM, CPU).config == replace(HEURISTIC, **OTHER)


def test_a_later_time_of_a_configuration_replaces_an_earlier_one(place):
    write(place, make(5.0, changed=OTHER), make(7.0), make(9.0, changed=OTHER))
    choice = select(PROBLEM, CPU)
    assert (choice.config, choice.origin.line) == (HEURISTIC, 2)
    # A search in passing does not.
    write(place, make(1.0, changed=OTHER, protocol="search"))
    assert select(PROBLEM, CPU).origin.line == 2


@pytest.mark.parametrize("first", [True, False])
def test_one_wrong_output_outweighs_right_ones(place, first):
    records = [failed(changed=OTHER), make(1.0, changed=OTHER)]
    write(place, *(records if first else reversed(records)), make(9.0))
    assert select(PROBLEM, CPU).config == HEURISTIC


def test_the_same_logs_give_the_same_choice(place):
    write(place, make(9.0, changed=OTHER), name="b")
    write(place, make(9.0, changed={"unroll": 3}), name="a")
    assert {select(PROBLEM, CPU).config for _ in range(3)} == {replace(HEURISTIC, unroll=3)}


def test_the_fastest_schedule_is_taken_unless_one_is_named(place):
    write(place, _simt(9.0), name="cuda_simt")
    write(place, _simt(8.0, "cuda_simt_explicit"), name="cuda_simt_explicit")
    choice = select(PROBLEM, H100)
    assert choice.schedule.name == "cuda_simt_explicit"
    assert choice.rejected["cuda_simt"] == "9.00 us by its own record (full)"
    assert choice.rejected["cpu_blocked"] == "target=cuda: cpu_blocked is for llvm"
    named = select(PROBLEM, H100, "cuda_simt")
    assert (named.schedule.name, named.origin.time_us) == ("cuda_simt", 9.0)
    assert named.rejected == {}


def test_a_schedule_without_records_gives_way(place):
    write(place, _simt(9.0, "cuda_simt_explicit"))
    choice = select(PROBLEM, H100)
    assert choice.schedule.name == "cuda_simt_explicit"
    assert choice.rejected["cuda_simt"] == "no tuning record; cuda_simt_explicit has one"
    assert str(select(PROBLEM, H100, "cuda_simt").origin) == "heuristic"


def test_only_the_named_device_counts(place):
    h200 = CudaTarget("sm_90", "NVIDIA H200")
    write(place, _simt(9.0))
    write(place, _simt(8.0, target=h200, changed={"vector": 2}))
    write(place, _simt(1.0, target=CudaTarget("sm_80", "NVIDIA A100")))
    assert select(PROBLEM, H100).origin.time_us == 9.0
    assert not select(PROBLEM, H100).origin.any_device
    anyone = select(PROBLEM, CudaTarget("sm_90"))
    assert (anyone.origin.device, anyone.config.vector) == ("NVIDIA H200", 2)
    assert str(anyone.origin).endswith("of any such device: the target names none")
    assert anyone.missed == ()
    # sm_90a names the same GPU.
    assert select(PROBLEM, CudaTarget("sm_90a")).origin == anyone.origin
    assert str(select(PROBLEM, CudaTarget("sm_86")).origin) == "heuristic"


def test_a_gpu_without_a_record_borrows_of_its_architecture(place, tmp_path, monkeypatch):
    h200 = CudaTarget("sm_90a", "NVIDIA H200")
    theirs = write(place, _simt(9.0, changed={"vector": 2}))
    write(place, _simt(1.0, target=CudaTarget("sm_80", "NVIDIA A100")))
    choice = select(PROBLEM, h200)
    assert (choice.config.vector, choice.origin.device) == (2, "NVIDIA H100")
    assert str(choice.origin) == (
        f"record {theirs}:1, 9.00 us on 'NVIDIA H100', borrowed: 'NVIDIA H200' has none"
    )
    # One of its own counts, however slow, wherever it is, unless it is of no use.
    own = replace(_simt(20.0, target=h200), versions={})
    path = write(place, own)
    choice = select(PROBLEM, h200)
    assert choice.origin.device == "NVIDIA H100"
    assert [miss.where for miss in choice.missed] == [f"{path}:1"]
    monkeypatch.setenv("IM2WIN_TUNING_LOGS", f"{place}:{tmp_path / 'mine'}")
    write(tmp_path / "mine", _simt(20.0, target=h200))
    choice = select(PROBLEM, h200)
    assert (choice.origin.time_us, choice.origin.borrower) == (20.0, None)
    assert str(select(PROBLEM, CudaTarget("sm_86", "NVIDIA A10")).origin) == "heuristic"


def test_processors_do_not_borrow(place):
    """What is fast on one depends on its threads, which the architecture does not tell."""
    write(place, make(1.0, changed=OTHER, device="another processor"))
    assert str(select(PROBLEM, CPU).origin) == "heuristic"


def test_a_target_names_the_gpu_that_is_here(monkeypatch):
    monkeypatch.setattr(cuda_driver, "compute_capability", lambda device=0: (9, 0))
    monkeypatch.setattr(cuda_driver, "device_name", lambda device=0: "NVIDIA H100")
    assert resolve("cuda") == CudaTarget("sm_90a", "NVIDIA H100")
    assert resolve("cuda", arch="sm_90") == H100
    assert resolve("cuda", arch="sm_90a").device == "NVIDIA H100"
    assert resolve("cuda", arch="sm_80") == CudaTarget("sm_80")
    monkeypatch.setattr(cuda_driver, "compute_capability", lambda device=0: None)
    assert resolve("cuda", arch="sm_90") == CudaTarget("sm_90")


def test_nothing_fits():
    with pytest.raises(ScheduleError, match=r"no schedule for llvm.*is for cuda"):
        select(PROBLEM, CPU, "cuda_simt")


def test_kernels_and_the_command_say_where_it_comes_from(place, tmp_path):
    path = write(place, replace(make(), versions={}), make(12.0, changed=OTHER))
    kernel = im2win_tvm.compile(PROBLEM, "llvm")
    origin = kernel.metadata["schedule"]["origin"]
    assert kernel.metadata["schedule"]["config"] == asdict(replace(HEURISTIC, **OTHER))
    assert (origin["kind"], origin["file"], origin["line"]) == ("record", str(path), 2)

    def shown(*arguments):
        result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.stdout

    text = shown(PROBLEM, "--target", "llvm")
    assert f"\nfrom             record {path}:2, 12.00 us on " in text
    assert "\nrecord not used  apache-tvm=None: here it is " in text
    facts = json.loads(shown(PROBLEM, "--target", "llvm", "--json"))
    assert facts["origin"] == origin
    ((reason, entry),) = facts["records_not_used"].items()
    assert reason.startswith("apache-tvm=None")
    assert entry == {"count": 1, "first": f"{path}:1"}
    exported = kernel.export(tmp_path / "kernel.so")
    assert f"\nfrom             record {path}:2\n" in shown(exported)
    chosen = select(PROBLEM, CPU, "cpu_blocked", {})
    assert chosen.origin.kind == "given"


def test_a_schedule_without_a_record_has_to_be_faster_by_far(place, monkeypatch):
    """By its model, than what others were measured to be."""
    write(place, _simt(10.0), name="cuda_simt")
    others = [s for s in supporting(PROBLEM, H100).values() if s.name != "cuda_simt"]
    for time, beats in ((None, False), (7.5, False), (6.9, True)):
        monkeypatch.setattr(type(others[0]), "microseconds", lambda *_, time=time: time)
        choice = select(PROBLEM, H100)
        assert (choice.schedule.name == "cuda_simt") != beats
        if beats:
            assert str(choice.origin) == "heuristic"
            assert choice.rejected["cuda_simt"] == (
                f"10.00 us by its own record (full), {choice.schedule.name} 6.9 predicted"
            )
