"""What a session is given to do, shows while it runs and says in the end; nothing is measured."""

import io
from dataclasses import replace

import pytest
from rich.console import Console
from tuning_records import CPU, PROBLEM, failed, make
from typer.testing import CliRunner

from im2win_tvm.cli import app, tune_text, tune_view
from im2win_tvm.tuning import curve, floor, lookup, plan, session
from im2win_tvm.tuning.measuring import TuningError
from im2win_tvm.tuning.plan import Deadline, Plan
from im2win_tvm.tuning.result import Result, cause

NAME = "cpu_blocked"
OTHER = PROBLEM.replace(batch=2)


def _searched(*entries, problem=PROBLEM):
    """A result of these trials: times of changed configurations, or what came instead."""
    result = Result(problem, NAME, make(problem=problem).config)
    for number, entry in enumerate(entries):
        changed = {"unroll": number + 1} if number else {}
        if entry == "wrong":
            record = failed(problem=problem, changed=changed)
        elif isinstance(entry, str):
            record = replace(failed(problem=problem, changed=changed), error=entry)
        else:
            record = make(entry, problem=problem, changed=changed)
        result.add(replace(record, protocol="search"))
        result.tried += 1
    return result


@pytest.fixture
def clock(monkeypatch):
    """The time, in seconds; one list entry that a test may change."""
    now = [100.0]
    monkeypatch.setattr(plan.time, "monotonic", lambda: now[0])
    return now


def test_a_deadline_is_shared_by_weight_and_what_is_left_goes_on(clock):
    deadline = Deadline(60.0, [1, 2, 3])
    assert deadline.share() == 10.0
    clock[0] += 4  # six seconds early
    assert deadline.share() == pytest.approx(56 * 2 / 5)
    clock[0] += 50
    assert not deadline.over
    assert deadline.share() == 0.0  # those before took 14 seconds more than their shares each
    clock[0] += 7
    assert deadline.over
    # Each of four takes two seconds more than its share: the last has as much as the others.
    deadline, shares = Deadline(48.0, [1, 1, 1, 1]), []
    for _ in range(4):
        shares.append(deadline.share())
        clock[0] += shares[-1] + 2
    assert shares == pytest.approx([12.0, 34 / 3 - 2, 34 / 3 - 2, 34 / 3 - 2])
    endless = Deadline(None, [1])
    assert (endless.share(), endless.left, endless.over) == (None, None, False)


def _play(board, clock, *entries):
    """Tell a board of a search, a second a trial."""
    told = Result(PROBLEM, NAME, make().config)
    board.search(told, 8)
    for record in _searched(*entries).records:
        told.tried += 1
        told.add(record)
        clock[0] += 1
        board.trial(told, record, False)
    return told


def test_the_board_counts(clock):
    board = tune_view.Board(3, 8, lambda problem, schedule: 5.0, Deadline(None, [1]))
    assert board.remaining() is None
    _play(board, clock, 20.0, 10.0, "wrong", "hangs: no answer")
    (row,) = board.rows
    assert (row.best_us, row.heuristic_us, row.speed()) == (10.0, 20.0, "2.00x")
    assert row.failures() == "1 wrong, 1 hang"
    assert board.roofline(row) == "50%"
    assert board.remaining() == 4 + 2 * 8
    limited = tune_view.Board(3, 8, lambda *_: None, Deadline(7.0, [1]))
    _play(limited, clock, 20.0)
    assert limited.remaining() == 6.0
    assert limited.roofline(limited.rows[0]) == "-"


def test_what_was_measured_before_takes_no_time(clock):
    board = tune_view.Board(1, 8, lambda *_: None, Deadline(None, [1]))
    told = Result(PROBLEM, NAME, make().config)
    board.search(told, 8)
    for record in _searched(20.0, 10.0, 5.0).records:
        told.tried += 1
        board.trial(told, record, True)
    assert board.remaining() is None
    clock[0] += 3
    board.trial(told, make(4.0), False)
    assert board.remaining() == 3.0 * 5


def test_on_a_terminal_there_is_a_table(clock):
    table = tune_view._Table(1, 8, lambda *_: 5.0, Deadline(None, [1]))
    told = _play(table, clock, 20.0, 10.0, "wrong", "ended its process (SIGSEGV)")
    table.building(told, 3)
    out = io.StringIO()
    Console(file=out, width=140, force_terminal=True, color_system=None).print(table)
    head, row, below = out.getvalue().splitlines()
    assert head.split() == (
        "problem schedule trials best us vs heuristic of roofline failed".split()
    )
    assert row.split() == (f"{PROBLEM} {NAME} 4/8 10.00 2.00x 50% 1 wrong, 1 crash".split())
    assert below.startswith(f"building 3 of {PROBLEM} {NAME}; 1 of 1 searches, 0:00:04, about")


def test_elsewhere_there_are_lines_of_what_is_new(clock, capsys):
    log = tune_view._Log(1, 8, lambda *_: None, Deadline(None, [1]))
    told = _play(log, clock, 20.0, 30.0, 10.0, "wrong")
    log.finals([told], 3)
    said = [line.split(" ", 2)[2] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        f"{PROBLEM} {NAME}: at most 8 trials",
        f"{PROBLEM} {NAME} 1/8: best 20.00 us, 1.00x the heuristic; "
        "1 of 1 searches, 0:00:01, about 0:00:07 left",
        f"{PROBLEM} {NAME} 3/8: best 10.00 us, 2.00x the heuristic; "
        "1 of 1 searches, 0:00:03, about 0:00:05 left",
        f"{PROBLEM} {NAME} 4/8: failed so far: 1 wrong",
        f"measuring the fastest 3 of {PROBLEM} again",
    ]


def test_causes():
    records = _searched(1.0, "wrong", "hangs: x", "ended its process (x)", "not built: x", "x: y")
    told = [cause(record) for record in records.records]
    assert told == [None, "wrong", "hang", "crash", "not built", "error"]


def test_the_curve_is_the_best_so_far(tmp_path):
    result = _searched(20.0, 40.0, "wrong", 10.0, 16.0)
    result.add(make(1.0))  # of the last round, which is no trial
    assert curve.best_so_far(result) == [1.0, 1.0, 1.0, 2.0, 2.0]
    assert curve.best_so_far(_searched("wrong", 10.0)) == []
    for count in (0, 1, 12):
        path = tmp_path / f"{count}.png"
        curve.draw([result] * count, path, "im2win tune")
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_floor_is_that_of_the_slower_ceiling():
    ceilings = {"sgemm": {"tflops": 50.0}, "copy": {"gb_s": 2000.0}}
    heavy = PROBLEM.replace(in_channels=512, out_channels=512, input_size=(64, 64))
    assert floor.floor_us(heavy, "fp32", ceilings) == pytest.approx(heavy.flops / 50e6)
    light = PROBLEM.replace(kernel_size=1, padding=0)
    assert floor.floor_us(light, "fp32", ceilings) == pytest.approx(light.min_bytes / 2e6)
    assert floor.measured(CPU, ["fp32"]) is None


def test_a_model_counts_each_convolution_as_often_as_it_has_it():
    plans = [Plan(PROBLEM, (NAME,), 3), Plan(OTHER, (NAME,), 1)]
    results = [_searched(20.0, 10.0), _searched(5.0, problem=OTHER)]
    assert tune_text.total(plans, results) == [
        "all 4 convolutions: 35.00 us, by the heuristic 65.00 us (1.86x)"
    ]
    missing = [results[0], _searched("wrong", problem=OTHER)]
    assert tune_text.total(plans, missing) == ["all convolutions: some have no time"]
    assert tune_text.total([Plan(PROBLEM, (NAME,))], results) == []


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """Sessions that measure nothing, and their folder."""
    monkeypatch.setenv(lookup.VARIABLE, str(tmp_path))
    tuned = []

    def search(self, searched, trials, seconds, bound):
        result = searched.result
        tuned.append((result.problem, seconds))
        result.tried = 1
        result.add(make(10.0 * result.problem.batch, problem=result.problem))

    monkeypatch.setattr(session.Session, "_open", lambda *others: None)
    monkeypatch.setattr(session.Session, "_search", search)
    return tuned


def _tune(*words):
    return CliRunner().invoke(app, ["tune", "--target", "llvm", *map(str, words)])


def test_the_convolutions_of_a_model_are_tuned_by_their_number(made_up, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    conv = torch.nn.Conv2d
    model = torch.nn.Sequential(conv(3, 4, 3, padding=1), *(conv(4, 4, 3, padding=1),) * 2).eval()
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (torch.zeros(1, 3, 8, 8),)), path)
    result = _tune(path, "--layout", "NCHW", "--time-limit", 90)
    assert result.exit_code == 0, result.output
    assert [str(problem) for problem, _ in made_up] == [
        "mb1ic3ih8oc4kh3ph1", "mb1ic4ih8oc4kh3ph1"
    ]  # fmt: skip
    # A third of the time, and then all that is left.
    assert [round(seconds / 10) for _, seconds in made_up] == [3, 9]
    assert "all 3 convolutions: 30.00 us" in result.stdout


def test_a_problem_that_cannot_be_measured_leaves_the_others_their_turn(made_up, monkeypatch):
    right = session.Session.tune

    def tune(self, problem, *others):
        if problem == PROBLEM:
            raise TuningError("cannot be measured here")
        return right(self, problem, *others)

    monkeypatch.setattr(session.Session, "tune", tune)
    result = _tune(PROBLEM, OTHER)
    assert result.exit_code == 1
    assert "ERROR cannot be measured here" in result.stdout
    assert [problem for problem, _ in made_up] == [OTHER]


def test_a_session_out_of_time_says_what_it_left(made_up, monkeypatch):
    monkeypatch.setattr(Deadline, "over", property(lambda self: bool(made_up)))
    result = _tune(PROBLEM, OTHER, "--time-limit", 5)
    assert result.stdout.splitlines()[-1] == "time is up: 1 of 2 problems were not begun"
    assert len(made_up) == 1
