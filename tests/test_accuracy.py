"""Accuracy classes from `compile` and the command down to records; the tf32 schedule is a fake."""

import json

import pytest
from tuning_records import CPU, PROBLEM, make, write
from typer.testing import CliRunner

import im2win_tvm
from im2win_tvm import AccuracyError, ScheduleError, accuracy
from im2win_tvm.bench import timing
from im2win_tvm.bench.baselines.im2win import Im2win
from im2win_tvm.bench.run import run
from im2win_tvm.builds import Request, build_all
from im2win_tvm.cli import app
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.schedules.cpu_blocked import CpuBlocked
from im2win_tvm.select import select, supporting
from im2win_tvm.tuning import lookup, session

BRIEF = timing.Limits(warmup=0.001, seconds=0.001, least=3, most=5)
HALF = PROBLEM.replace(dtype="float16")
TEXT = str(PROBLEM)


class Rounded(CpuBlocked):
    """Says that it computes float32 in TF32."""

    name = "cpu_rounded"

    def supports(self, problem, target):
        if problem.dtype != "float32":
            return f"dtype={problem.dtype}: {self.name} takes float32"
        if problem.groups > 1:
            return f"groups={problem.groups}: {self.name} takes one"
        return super().supports(problem, target)

    def accuracy(self, problem):
        return "tf32"


@pytest.fixture(autouse=True)
def rounded(monkeypatch):
    """A schedule in tf32 beside the others."""
    monkeypatch.setitem(SCHEDULES, Rounded.name, Rounded())


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Where records are looked for; nothing that ships."""
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path / "shipped")
    folder = tmp_path / "logs"
    folder.mkdir()
    monkeypatch.setenv(lookup.VARIABLE, str(folder))
    return folder


@pytest.fixture
def im2win():
    """Runs a command in this process, on the CPU."""

    def invoke(*arguments):
        return CliRunner().invoke(app, [*map(str, arguments), "--target", "llvm"])

    return invoke


def test_classes_of_a_dtype():
    for wanted in (None, "fp32", "fast", "strict"):
        assert accuracy.accepted("float32", wanted) == ("fp32",)
    assert accuracy.accepted("float32", "tf32") == ("tf32", "fp32")
    assert accuracy.accepted("bfloat16", "bf16") == ("bf16",)
    for dtype, wanted in (("float16", "tf32"), ("float16", "fp32"), ("float32", "fp16")):
        with pytest.raises(AccuracyError, match=f"accuracy='{wanted}': allowed for {dtype}: "):
            accuracy.accepted(dtype, wanted)


def test_every_schedule_has_the_class_of_the_dtype_unless_it_says_so():
    for name, schedule in SCHEDULES.items():
        kinds = accuracy.allowed("float32") if "tf32" in name or name == Rounded.name else ("fp32",)
        assert schedule.accuracy(PROBLEM) in kinds
        assert name == Rounded.name or schedule.accuracy(HALF) in ("fp16", "tf32")


@pytest.mark.parametrize("wanted", [None, "fp32"])
def test_float32_never_gets_tf32(wanted, place):
    write(place, make(1.0, schedule=Rounded.name), name=Rounded.name)
    choice = select(PROBLEM, CPU, accuracy=wanted)
    assert (choice.schedule.name, str(choice.origin)) == ("cpu_blocked", "heuristic")
    assert choice.rejected[Rounded.name] == (
        f"accuracy={wanted!r}: cpu_rounded computes float32 in tf32; pass accuracy='tf32'"
    )
    assert list(supporting(PROBLEM, CPU, accuracy=wanted)) == ["cpu_blocked"]
    for config in (None, {}):
        with pytest.raises(ScheduleError, match="in tf32; pass accuracy='tf32'"):
            select(PROBLEM, CPU, Rounded.name, config, wanted)
    with pytest.raises(ScheduleError, match="pass accuracy='tf32'"):
        im2win_tvm.compile(PROBLEM, "llvm", schedule=Rounded(), accuracy=wanted)


def test_tf32_is_preferred_where_it_is_asked_for():
    assert select(PROBLEM, CPU, accuracy="tf32").schedule.name == Rounded.name
    assert list(supporting(PROBLEM, CPU, accuracy="tf32")) == [Rounded.name, "cpu_blocked"]
    # Better is acceptable: where none of tf32 takes the problem, or by name.
    grouped = PROBLEM.replace(in_channels=4, out_channels=4, groups=2)
    choice = select(grouped, CPU, accuracy="tf32")
    assert choice.schedule.name == "cpu_blocked"
    assert select(PROBLEM, CPU, "cpu_blocked", accuracy="tf32").schedule.name == "cpu_blocked"
    with pytest.raises(AccuracyError, match="accuracy='tf32': allowed for float16: fp16"):
        select(HALF, CPU, accuracy="tf32")


def test_records_of_float32_do_not_keep_tf32_out(place):
    write(place, make(1.0, changed={"unroll": 2}))
    choice = select(PROBLEM, CPU, accuracy="tf32")
    assert (choice.schedule.name, str(choice.origin)) == (Rounded.name, "heuristic")
    assert select(PROBLEM, CPU).origin.kind == "record"
    # Where both were measured, the faster one is taken: here it is the more exact one, too.
    write(place, make(9.0, schedule=Rounded.name), name=Rounded.name)
    assert select(PROBLEM, CPU, accuracy="tf32").schedule.name == "cpu_blocked"
    write(place, make(0.5, schedule=Rounded.name), name=Rounded.name)
    choice = select(PROBLEM, CPU, accuracy="tf32")
    assert (choice.schedule.name, choice.origin.time_us) == (Rounded.name, 0.5)


def test_a_kernel_says_its_class(im2win, tmp_path):
    kernel = im2win_tvm.compile(PROBLEM, "llvm", accuracy="tf32")
    assert (kernel.metadata["accuracy"], kernel.metadata["schedule"]["name"]) == (
        "tf32",
        Rounded.name,
    )
    exact = im2win_tvm.compile(PROBLEM, "llvm", accuracy="tf32", schedule="cpu_blocked")
    assert exact.metadata["accuracy"] == "fp32"
    path = tmp_path / "conv.so"
    result = im2win("export", TEXT, "-o", path, "--accuracy", "tf32")
    assert result.exit_code == 0, result.output
    assert "\naccuracy         tf32\n" in result.stdout
    assert im2win_tvm.read_metadata(path)["accuracy"] == "tf32"


def test_builds_of_a_class():
    asked = Request(PROBLEM, CPU, Rounded.name)
    refused, built = build_all([asked, Request(PROBLEM, CPU, Rounded.name, accuracy="tf32")])
    assert isinstance(refused, ScheduleError)
    assert built.metadata["accuracy"] == "tf32"


def test_inspect_shows_the_class_and_what_it_leaves_out(im2win):
    result = im2win("inspect", TEXT)
    assert "\naccuracy         fp32\n" in result.stdout
    assert "\nnot cpu_rounded  accuracy=None: cpu_rounded computes float32 in tf32" in result.stdout
    facts = json.loads(im2win("inspect", TEXT, "--accuracy", "tf32", "--json").stdout)
    assert (facts["accuracy"], facts["schedule"]) == ("tf32", Rounded.name)


@pytest.mark.parametrize("command", ["bench", "verify", "tune", "export", "inspect"])
def test_commands_refuse_a_class_that_the_dtype_has_not(im2win, command, tmp_path):
    more = ("-o", tmp_path / "conv.so") if command == "export" else ()
    result = im2win(command, TEXT, "--dtype", "float16", "--accuracy", "tf32", *more)
    assert result.exit_code == 2
    assert "accuracy='tf32': allowed for float16: fp16" in result.stderr
    result = im2win(command, TEXT, "--accuracy", "exact", *more)
    assert result.exit_code == 2
    assert "accuracy='exact': allowed for float32: fp32 or fast or strict or tf32" in result.stderr


def test_verify_holds_a_kernel_to_its_own_class(im2win, tmp_path):
    path = tmp_path / "results.json"
    arguments = ("verify", TEXT, "--fill", "normal", "--json", path)
    result = im2win(*arguments, "--accuracy", "tf32", "--all-schedules")
    assert result.exit_code == 0, result.output
    assert "--accuracy tf32" in result.stdout
    cases = [(case["schedule"], case["accuracy"]) for case in json.loads(path.read_text())["cases"]]
    assert cases == [(Rounded.name, "tf32"), ("cpu_blocked", "fp32")]
    result = im2win(*arguments, "--all-schedules")
    assert [case["schedule"] for case in json.loads(path.read_text())["cases"]] == ["cpu_blocked"]
    # Named without its class it is a refusal, which is no passed case.
    result = im2win(*arguments, "--schedule", Rounded.name)
    assert result.exit_code == 1 and "pass accuracy='tf32'" in result.stdout


def test_tune_one_class(im2win, place, monkeypatch):
    monkeypatch.setattr(session, "limits_for", lambda target: BRIEF)
    monkeypatch.setattr(session, "SEARCH", BRIEF)
    result = im2win("tune", TEXT, "--trials", 2, "--accuracy", "tf32")
    assert result.exit_code == 0, result.output
    assert [path.stem for path in place.glob("*/*.jsonl")] == [Rounded.name]
    assert select(PROBLEM, CPU, accuracy="tf32").origin.kind == "record"
    assert str(select(PROBLEM, CPU).origin) == "heuristic"
    again = im2win("tune", "--again")
    assert again.exit_code == 2 and "no record of these problems" in again.stderr
    again = im2win("tune", "--again", "--accuracy", "tf32", "--trials", 1)
    assert again.exit_code == 0, again.output
    refused = im2win("tune", TEXT, "--schedule", Rounded.name)
    assert refused.exit_code == 2 and "pass accuracy='tf32'" in refused.stderr


def test_bench_measures_ours_in_the_class_that_is_asked_for(im2win, tmp_path):
    entries = [Im2win("cpu_blocked"), Im2win(Rounded.name)]
    for wanted, name, kind in ((None, "cpu_blocked", "fp32"), ("tf32", Rounded.name, "tf32")):
        record = run({"small": PROBLEM}, CPU, entries, BRIEF, accuracy=wanted)
        (entry,) = record["layers"][0]["implementations"]
        assert (entry["name"], entry["accuracy"], entry["status"]) == (name, kind, "ok")
    path = tmp_path / "record.json"
    command = ("bench", TEXT, "--against", "none", "--time-limit", 0.03, "--json", path)
    result = im2win(*command, "--accuracy", "tf32", "--schedule", "cpu_blocked, cpu_rounded")
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    assert [e["name"] for e in record["layers"][0]["implementations"]] == [Rounded.name]
    assert record["protocol"]["limits"]["seconds"] == pytest.approx(0.02)
    assert record["seconds"] > 0
    assert im2win(*command[:2], "--time-limit", 0).exit_code == 2


class Fast(CpuBlocked):
    """As exact as a plain convolution for most inputs: of the class fp32 by the rule "fast"."""

    name = "cpu_fast"

    def is_strict(self, problem):
        return False


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr("im2win_tvm.select.SCHEDULES", {Fast.name: Fast(), **SCHEDULES})


def test_strict_leaves_out_what_is_not_bounded_for_every_input(fast):
    for wanted in (None, "fp32", "fast"):
        assert select(PROBLEM, CPU, accuracy=wanted).schedule.name == Fast.name
    choice = select(PROBLEM, CPU, accuracy="strict")
    assert choice.schedule.name == "cpu_blocked"
    assert choice.rejected[Fast.name] == (
        "accuracy='strict': cpu_fast is as exact as a plain convolution for the inputs that "
        "docs/accuracy.md describes, and not for every one"
    )
    with pytest.raises(ScheduleError, match="accuracy='strict': cpu_fast is as exact"):
        select(PROBLEM, CPU, Fast.name, accuracy="strict")
    with pytest.raises(AccuracyError, match="accuracy='strict': allowed for float16: fp16"):
        select(HALF, CPU, accuracy="strict")


def test_a_kernel_says_its_rule(fast, im2win, tmp_path):
    for wanted, strict in ((None, False), ("strict", True)):
        kernel = im2win_tvm.compile(PROBLEM, "llvm", accuracy=wanted)
        assert (kernel.metadata["accuracy"], kernel.metadata["strict"]) == ("fp32", strict)
        path = kernel.export(tmp_path / "conv.so")
        shown = im2win("inspect", path).stdout
        assert ("\naccuracy         fp32, fast: see docs/accuracy.md\n" in shown) != strict
