"""Logs as files: verified, merged, pruned, searched, and what a stranger may have put into them."""

import json
import os
import random
import sys
from dataclasses import replace

import pytest
from tuning_records import CPU, H100, PROBLEM, failed, make, write
from typer.testing import CliRunner

from im2win_tvm.bench import timing
from im2win_tvm.builds import Builder
from im2win_tvm.cli import app
from im2win_tvm.select import select
from im2win_tvm.tuning import lookup, session, verifying
from im2win_tvm.tuning.logs import merge, prune
from im2win_tvm.tuning.measuring import Measurement, Measurer
from im2win_tvm.tuning.records import Record, RecordError, read
from im2win_tvm.tuning.verifying import verify

BRIEF = timing.Limits(warmup=0.001, seconds=0.001, least=3, most=5)


@pytest.fixture
def im2win(monkeypatch):
    """Runs the command in this process."""
    monkeypatch.setattr(session, "SEARCH", BRIEF)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def _times(place):
    return [
        [line.record.time_us for line in read(path)] for path in sorted(place.glob("*/*.jsonl"))
    ]


def test_merging_adds_each_record_once(tmp_path):
    one, two, into = tmp_path / "one", tmp_path / "two", tmp_path / "into"
    write(one, make(1.0), make(2.0, changed={"unroll": 2}), b'{"format":1,\n')
    write(two, make(2.0, changed={"unroll": 2}), make(3.0, changed={"unroll": 3}))
    write(two, make(4.0, target=H100, schedule="cuda_simt"), name="cuda_simt")
    write(into, make(1.0)).open("ab").write(b"torn")
    added, had, refused = merge([one, two], into)
    assert (added, had) == (3, 2)
    assert [(entry.path.parts[-3], entry.number) for entry in refused] == [("one", 3)]
    # The torn line stays where it was, and spoils nothing after it.
    (cpu,) = into.glob("*/cpu_blocked.jsonl")
    lines = [line.record for line in read(cpu)]
    assert lines.pop(1).startswith("not JSON")
    assert [record.time_us for record in lines] == [1.0, 2.0, 3.0]
    assert (into / "nvidia-h100" / "cuda_simt.jsonl").is_file()
    assert merge([one, two], into)[:2] == (0, 5)


@pytest.mark.parametrize(
    "changes", [{"schedule": "../../gone"}, {"schedule": "a" * 300}, {"device": "../.."}]
)
def test_where_a_record_goes_is_never_a_path_of_a_stranger(tmp_path, changes):
    path = write(tmp_path / "from" / "x", make())
    path.write_bytes(replace(make(), **changes).line())
    into = tmp_path / "a" / "b" / "into"
    added, _, (refused,) = merge([tmp_path / "from" / "x"], into)
    assert (added, refused.number) == (0, 1)
    assert not into.exists()


def test_pruning_keeps_the_best_of_each_problem_and_what_was_wrong(tmp_path):
    other = PROBLEM.replace(batch=2)
    write(
        tmp_path,
        make(5.0, changed={"unroll": 2}, protocol="search"),
        make(9.0, changed={"unroll": 2}),
        make(7.0, protocol="search"),
        make(8.0),
        failed(changed={"unroll": 3}),
        make(1.0, changed={"unroll": 3}),
        replace(failed(changed={"unroll": 4}), error="hangs"),
        make(99.0, problem=other),
        make(2.0, changed={"unroll": 4}, versions={"code": "0123"}),
        b"nothing\n",
    )
    stay, went, refused = prune(tmp_path, 1)
    assert (stay, went) == (6, 3)
    assert [entry.number for entry in refused] == [10]
    assert _times(tmp_path) == [[7.0, 8.0, float("inf"), 1.0, 99.0, 2.0]]
    assert prune(tmp_path, 1)[1:] == (0, [])


def test_pruning_keeps_what_selection_compares_with(tmp_path):
    """The heuristic's, however slow; of a device that is not here only where it is a GPU."""
    write(tmp_path, *(make(9.0 - n, changed={"unroll": n}) for n in (2, 3)), make(9.0))
    gpu = dict(target=H100, schedule="cuda_simt", device="NVIDIA A")
    write(tmp_path, make(9.0, **gpu), make(8.0, changed={"vector": 1}, **gpu), name="cuda_simt")
    write(tmp_path, make(9.0, device="B"), make(8.0, device="B", changed={"unroll": 2}))
    assert prune(tmp_path, 1)[:2] == (5, 2)
    assert sorted(_times(tmp_path)) == [[6.0, 9.0], [8.0], [9.0, 8.0]]


def test_a_log_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    path = write(tmp_path, make(1.0), make(2.0, changed={"unroll": 2}))
    before = path.read_bytes()

    def full(handle):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        prune(tmp_path, 1)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_finding_the_records_of_a_problem(tmp_path, im2win):
    path = write(
        tmp_path,
        make(9.0),
        make(5.0, changed={"unroll": 2}),
        make(1.0, changed={"unroll": 3}, versions={"code": "0123"}),
        make(2.0, problem=PROBLEM.replace(batch=2)),
        failed(changed={"unroll": 4}),
    )
    words = ("logs", "find", PROBLEM, "--target", "llvm", "--in", tmp_path)
    rows = json.loads(im2win(*words, "--json").stdout)
    assert [row["where"].removeprefix(f"{path}:") for row in rows] == ["3", "2", "1", "5"]
    assert rows[0]["unusable"].startswith("apache-tvm=None")
    assert [row["unusable"] for row in rows[1:]] == [None] * 3
    assert rows[3]["result"] == "wrong"
    text = im2win(*words).stdout
    assert "4 records" in text and "5.00 us full   cpu_blocked" in text


def test_the_commands_tell_what_they_refused(tmp_path, im2win):
    path = write(tmp_path / "a", make(1.0), make(2.0, changed={"unroll": 2}), b"torn")
    result = im2win("logs", "merge", tmp_path / "a", "--into", tmp_path / "b")
    assert result.exit_code == 1
    assert f"refused {path}:3: not JSON" in result.stdout
    assert "2 records added" in result.stdout
    assert im2win("logs", "prune", tmp_path / "b", "--keep", 1).exit_code == 0
    assert _times(tmp_path / "b") == [[1.0]]
    assert im2win("logs", "prune", tmp_path / "gone").exit_code == 2


def test_verifying_replays_every_record(tmp_path, im2win):
    path = write(
        tmp_path,
        make(5.0),
        make(1.0, changed={"unroll": 2}),
        failed(changed={"unroll": 3}),
        make(1.0, changed={"lanes": 3}),
        make(1.0, versions={"code": "0123", "apache-tvm": make().versions["apache-tvm"]}),
        make(2.0, device="Another"),
        b'{"format":1}\n',
    )
    before = path.read_bytes()
    told = tmp_path / "told.json"
    words = ("--target", "llvm", "--out", tmp_path, "--json", told)
    result = im2win("tune", "--verify-logs", *words)
    assert result.exit_code == 1
    verdicts = {
        int(each["where"].rpartition(":")[2]): each for each in json.loads(told.read_text())
    }
    states = [verdicts[number]["state"] for number in range(1, 8)]
    assert states == ["right", "right", "right", "refused", "stale", "elsewhere", "refused"]
    assert verdicts[3]["text"] == "its output is right today"
    assert f"{path}:4: refused: config: lanes=3" in result.stdout
    assert f"{path}:7: refused: check: missing" in result.stdout
    assert result.stdout.splitlines()[-1] == ("7 lines: 2 refused, 1 stale, 1 elsewhere, 3 right")
    assert path.read_bytes() == before


def test_verifying_compares_with_what_is_recorded(tmp_path, monkeypatch):
    """Kernels are made up: one right at twice the time, one wrong, one that hangs."""
    times = {"warm": timing.Times(10.0, 0.1, 5)}
    came = [
        Measurement(None, True, 1e-7, "", times),
        Measurement(None, False, None, "3 of 9 outputs are wrong"),
        Measurement("hangs: no answer within 60 s"),
    ]
    kernels = type(
        "Kernels", (Builder,), {"build": lambda self, requests: [_Made() for _ in requests]}
    )
    monkeypatch.setattr(verifying, "Builder", kernels)
    monkeypatch.setattr(Measurer, "measure", lambda *_: [came.pop(0)])
    hung = replace(failed(changed={"unroll": 3}), error="hangs")
    write(tmp_path, make(5.0), make(4.0, protocol="search"))
    write(tmp_path, failed(changed={"unroll": 2}), make(3.0, changed={"unroll": 2}))
    write(tmp_path, hung, make(3.0, changed={"unroll": 3}))
    verdicts = list(verify([tmp_path], CPU, BRIEF, 1, timed=True))
    assert [(each.state, each.faster) for each in verdicts] == [
        ("right", 0.5),
        ("right", None),
        ("right", None),  # as wrong as it was
        ("wrong", None),
        ("right", None),
        ("failed", None),
    ]
    assert verdicts[3].text == "3 of 9 outputs are wrong"


class _Made:
    """In place of a kernel."""

    def export(self, path):
        return path


def _mutations(chance, count):
    """Records with one part replaced by something else, and lines with bytes changed."""
    good = json.loads(make().line())
    places = [(), ("config",), ("target",), ("versions",), ("times", "warm"), ("check",)]
    values = [None, True, -1, 0, 10**400, 1e308, -1e-320, "", "x" * 9999, "../../etc/passwd",
              "__import__('os').system('touch {flag}')", "\x1b[2J", [], {}, [[1]], {"a": {"b": 1}},
              "mb" + "9" * 400 + "ic3", 2**63, "nan", [10**30]]  # fmt: skip
    for _ in range(count):
        data = json.loads(json.dumps(good))
        for _ in range(chance.randint(1, 3)):
            part = data
            for name in chance.choice(places):
                part = part[name] if isinstance(part.get(name), dict) else part
            name = chance.choice([*part, "new", "__class__"])
            part[name] = chance.choice(values)
        line = bytearray(json.dumps(data).encode())
        if chance.random() < 0.3:
            for _ in range(chance.randint(1, 4)):
                line[chance.randrange(len(line))] = chance.randrange(256)
        yield bytes(line).replace(b"\n", b" ").replace(b"\r", b" ")


def test_whatever_is_in_a_line_it_is_a_record_or_refused():
    chance = random.Random(7)
    outcomes = set()
    for line in _mutations(chance, 3000):
        try:
            record = Record.parse(line)
        except RecordError as error:
            assert str(error).isprintable() and len(str(error)) < 300, line
            outcomes.add("refused")
        else:
            assert Record.parse(record.line()) == record
            outcomes.add("record")
    assert outcomes == {"refused", "record"}


@pytest.fixture
def audited():
    """What Python is asked to run or write while the list is watched, which begins with a call."""
    seen, watching = [], []
    running = ("exec", "compile", "import", "os.system", "subprocess.Popen", "os.exec", "os.fork",
               "ctypes.dlopen", "pickle.find_class", "marshal.loads")  # fmt: skip

    def hook(event, arguments):
        if watching and event == "open" and arguments[1] not in ("r", "rb", None):
            seen.append((event, arguments))
        if watching and event in running:
            seen.append((event, arguments))

    sys.addaudithook(hook)  # for good: it cannot be taken off, and does nothing afterwards
    yield lambda: watching.append(True) or seen
    watching.clear()


def test_a_hostile_log_runs_nothing_and_every_refusal_has_its_line(tmp_path, monkeypatch, audited):
    """Read, looked up, listed and told whether to verify, as an audit hook sees it."""
    select(PROBLEM, CPU)  # imports what it needs
    mutated = list(_mutations(random.Random(11), 400))
    write(tmp_path, *(line + b"\n" for line in mutated), make(5.0))
    monkeypatch.setenv(lookup.VARIABLE, str(tmp_path))
    seen = audited()
    choice = select(PROBLEM, CPU)
    lookup.recorded([tmp_path], CPU)
    lines = [line for _, line in lookup.lines(tmp_path, None)]
    for line in lines:
        if isinstance(line.record, Record):
            verifying._case(line.record, CPU)
    assert seen == []
    exec("1")  # which the hook does see
    assert seen.pop(0)[0] == "compile"
    assert [line.number for line in lines] == list(range(1, len(mutated) + 2))
    refused = [line for line in lines if isinstance(line.record, str)]
    assert 100 < len(refused) < len(mutated)
    assert choice.origin.kind == "record"


def test_the_shipped_logs_are_records():
    """Every line, whatever it is of: what ships is not refused."""
    refused = [
        (path, line.number, line.record)
        for path, line in lookup.lines(lookup.SHIPPED, None)
        if not isinstance(line.record, Record)
    ]
    assert refused == []
    assert select(PROBLEM, CPU).origin.kind == "heuristic"
