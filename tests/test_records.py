"""Tuning records as text: what is written is read again, and what is no record is a miss."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from tuning_records import H100, PROBLEM, failed, make, write

from im2win_tvm.tuning import code_version as code_version_module
from im2win_tvm.tuning.code_version import code_version, digest, sources
from im2win_tvm.tuning.records import Record, RecordError, append, read

GOOD = json.loads(make().line())


def _line(**changes):
    return json.dumps(GOOD | changes).encode()


@pytest.mark.parametrize(
    "record",
    [
        make(),
        make(12.5, changed={"unroll": 2}, protocol="search", driver="580.1", commit="abc"),
        make(target=H100, schedule="cuda_simt", problem=PROBLEM.replace(layout="NHWC")),
        failed(problem=PROBLEM.replace(padding=((0, 1), (2, 0)), dtype="float16")),
        replace(failed(), error="hangs: no answer within 60 s"),
    ],
)
def test_round_trip(record):
    line = record.line()
    assert line.count(b"\n") == 1
    assert Record.parse(line) == record


def test_the_time_of_a_wrong_output_is_infinite():
    assert make(12.5).time_us == 12.5
    assert failed().time_us == float("inf")


MALFORMED = {
    "nothing": (b"{}", "format=None"),
    "no JSON": (b'{"format": 1,', "not JSON"),
    "no object": (b"[1]", "a JSON object"),
    "no text": (b"\xff\xfe\x00", "not JSON"),
    "nested": (b"[" * 40_000, "not JSON"),
    "nested just short of the parser's limit": (
        b'{"format":' + b"[" * 900 + b"]" * 900 + b"}",
        "",
    ),
    "huge integer": (b'{"format":' + b"9" * 30_000 + b"}", "not JSON"),
    "another format": (_line(format=2), "format=2: this version reads 1"),
    "true is no format": (_line(format=True), "format=True"),
    "infinite": (_line(times={"warm": {"median_us": 1e999}}), "not JSON: 'Infinity is no JSON'"),
    "larger than a float": (
        _line(times={"warm": GOOD["times"]["warm"] | {"median_us": 10**400}}),
        "median_us=1000",
    ),
    "negative": (_line(times={"warm": GOOD["times"]["warm"] | {"iqr_us": -1}}), "iqr_us=-1"),
    "no time at all": (_line(times={"warm": GOOD["times"]["warm"] | {"median_us": 0}}), "more"),
    "true is no time": (_line(times={"warm": GOOD["times"]["warm"] | {"n": True}}), "n=True"),
    "times of another target": (_line(times={"cold": GOOD["times"]["warm"]}), "warm is missing"),
    "times are no object": (_line(times={"warm": 3}), "an object for each cache state"),
    "no problem": (_line(problem="ic3"), "problem='ic3'"),
    "a problem that is none": (_line(problem=3), "problem=3: allowed: a JSON string"),
    "an escape sequence": (_line(problem="\x1b[31m"), "problem='\\x1b[31m'"),
    "an unknown dtype": (_line(dtype="int4"), "int4"),
    "an unknown target": (_line(target={"kind": "vax", "arch": "780"}), "kind='vax'"),
    "code for a config": (_line(config="__import__('os')"), "config=\"__import__('os')\""),
    "objects in a config": (_line(config={"unroll": {"a": 1}}), "a scalar or a list of scalars"),
    "an unknown protocol": (_line(protocol="guess"), "protocol='guess'"),
    "passed as text": (_line(check={"passed": "yes"}), "passed='yes'"),
    "a version that is a number": (_line(versions={"code": 3}), "code=3"),
    "an error that is a number": (_line(error=3), "error=3: allowed: a JSON string or null"),
    "an error of what passed": (_line(error="hangs"), "error='hangs': allowed: none where"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_lines(line, message, tmp_path):
    path = write(tmp_path, line + b"\n", make())
    (number, reason), (_, good) = read(path)
    assert number == 1
    assert isinstance(reason, str)
    assert message in reason
    assert reason.isprintable()
    assert len(reason) < 300
    assert good == make()


def test_every_field_is_asked_for():
    for name in GOOD.keys() - {"driver", "commit", "date"}:
        with pytest.raises(RecordError, match=name):
            Record.parse(json.dumps({k: v for k, v in GOOD.items() if k != name}).encode())


def test_a_line_without_end_is_not_read_into_memory(tmp_path):
    path = write(tmp_path, b"x" * 5_000_000 + b"\n", make(), b"\n\n", make(11.0))
    lines = read(path)
    assert [line.number for line in lines] == [1, 2, 5]
    assert lines[0].record == "longer than 65536 bytes"
    assert lines[2].record.time_us == 11.0


def test_a_file_that_cannot_be_read_is_a_miss(tmp_path):
    ((number, reason),) = read(tmp_path / "absent.jsonl")
    assert (number, reason) == (0, "cannot be read: No such file or directory")
    assert "cannot be read" in read(tmp_path)[0].record


def test_a_log_is_read_again_once_it_has_grown(tmp_path):
    path = write(tmp_path, make(1.0))
    assert len(read(path)) == 1
    append(path, make(2.0))
    assert [line.record.time_us for line in read(path)] == [1.0, 2.0]


def test_a_line_cut_short_costs_only_itself(tmp_path):
    path = write(tmp_path, make(1.0).line()[:-100])
    append(path, make(2.0))
    append(path, make(3.0))
    cut, *rest = read(path)
    assert cut.record.startswith("not JSON")
    assert [line.record.time_us for line in rest] == [2.0, 3.0]


def test_writers_at_once(tmp_path):
    """Every line of four processes arrives whole."""
    script = (  # that does not import TVM, so that they all write at the same time
        "import dataclasses, pathlib, sys\n"
        "from im2win_tvm.tuning.records import Record, append\n"
        "made, times = Record.parse(sys.argv[1].encode()), {'n': 30, 'iqr_us': 0.5}\n"
        "for turn in range(25):\n"
        "    times['median_us'] = float(sys.argv[3]) + turn\n"
        "    append(pathlib.Path(sys.argv[2]), dataclasses.replace(made, times={'warm': times}))\n"
    )
    path = tmp_path / "new" / "log.jsonl"
    line = make().line().decode()
    running = [
        subprocess.Popen([sys.executable, "-c", script, line, str(path), str(writer)])
        for writer in (100, 200, 300, 400)
    ]
    assert [process.wait() for process in running] == [0] * 4
    times = [line.record.time_us for line in read(path)]
    assert sorted(times) == [first + turn for first in (100, 200, 300, 400) for turn in range(25)]


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda handle, data: len(data) - 1)
    with pytest.raises(OSError, match="written in part only"):
        append(tmp_path / "log.jsonl", make())


def test_code_version_ignores_what_no_kernel_depends_on():
    plain = digest({"a": "def f(x):\n    return x + 1\n"})
    same = '"""Text."""\n\n# Why.\ndef f(x):\n    """More."""\n    return (x  +  1)\n'
    assert digest({"a": same}) == plain
    for other in ("def f(x):\n    return x + 2\n", "def f(x, y=None):\n    return x + 1\n"):
        assert digest({"a": other}) != plain
    assert digest({"b": "def f(x):\n    return x + 1\n"}) != plain


def test_code_version_covers_what_a_schedule_is_built_from():
    simt = sources("im2win_tvm.schedules.cuda_simt")
    assert {
        "im2win_tvm.schedules.cuda_simt",
        "im2win_tvm.schedules.cuda_elementwise",
        "im2win_tvm.expr.convolution",
        "im2win_tvm.expr.transform",
        "im2win_tvm.expr.filter",
    } <= set(simt)
    assert not {
        "im2win_tvm.schedules.base",
        "im2win_tvm.schedules.cpu_blocked",
        "im2win_tvm.expr",
        "im2win_tvm.problem",
    } & set(simt)
    assert all(path.is_file() for path in simt.values())


def test_code_version_changes_with_each_source():
    """One more statement in any of the files is another version."""
    module = "im2win_tvm.schedules.cuda_simt"
    texts = {name: path.read_text() for name, path in sources(module).items()}
    seen = {digest(texts)} | {digest(texts | {n: t + "\nX = 1\n"}) for n, t in texts.items()}
    assert len(seen) == len(texts) + 1


def test_a_schedule_without_source_has_no_code_version(monkeypatch):
    made = type("Made", (), {"__module__": "nowhere"})()
    assert code_version(made) is None
    monkeypatch.setattr(code_version_module, "_locate", lambda name: (_ for _ in ()).throw(OSError))
    code_version_module._version.cache_clear()
    assert code_version(made) is None


def test_a_record_keeps_what_it_is_given():
    record = replace(make(), config={"unroll": 1, "shape": [1, 2]})
    assert Record.parse(record.line()).config == {"unroll": 1, "shape": [1, 2]}
