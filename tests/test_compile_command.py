"""`im2win compile`: many problems in one command, by records where there are any."""

import json

import pytest
from tuning_records import CPU, PROBLEM, make, write
from typer.testing import CliRunner

from im2win_tvm import environment
from im2win_tvm.artifact import read_metadata
from im2win_tvm.builds import Builder
from im2win_tvm.cli import app
from im2win_tvm.schedules import ScheduleError
from im2win_tvm.suites import SUITES, suite
from im2win_tvm.tuning import lookup

OTHER = PROBLEM.replace(batch=2)


def _compile(*words):
    return CliRunner().invoke(app, ["compile", *map(str, words)])


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv(lookup.VARIABLE, str(tmp_path / "logs"))
    return tmp_path / "logs"


def test_records_decide_and_a_failure_does_not_stop_the_rest(place, tmp_path):
    write(place, make(5.0, changed={"unroll": 2}))
    told, out = tmp_path / "told.json", tmp_path / "out"
    refused = "mb1ic4iw9oc4kw3"
    result = _compile(
        PROBLEM, refused, OTHER, PROBLEM, "--target", "llvm", "--out", out, "--json", told
    )
    assert result.exit_code == 1
    first, second, third = json.loads(told.read_text())
    assert (first["origin"], first["config"]["unroll"]) == ("record", 2)
    assert first["record"].endswith(f"{environment.slug(environment.device_name(CPU))}/"
                                    "cpu_blocked.jsonl:1")  # fmt: skip
    assert (second["names"], second["origin"]) == ([refused], "failed")
    assert "no schedule for llvm" in second["error"]
    assert third["origin"] == "heuristic"
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{problem}-float32-NCHW.so" for problem in (PROBLEM, OTHER)
    )
    assert read_metadata(first["file"])["schedule"]["config"]["unroll"] == 2
    lines = result.stdout.splitlines()
    assert lines[1].split()[:2] == [refused, "FAILED"]
    assert lines[-1].startswith("3 problems: 1 record, 1 heuristic, 1 failed; ")


def test_every_layer_of_all_suites_is_asked_for_once(monkeypatch):
    """Without compiling: what is built, and by how many processes."""
    seen = []

    def build(self, requests):
        seen.extend([self.jobs, *requests])
        return (ScheduleError("not here") for _ in requests)

    monkeypatch.setattr(Builder, "build", build)
    words = ("--target", "cuda", "--arch", "sm_90a", "--dtype", "float16", "--layout", "NHWC")
    result = _compile("--suite", "all", "--mb", 128, "--jobs", 3, *words)
    assert result.exit_code == 1
    wanted = {p for name in SUITES for p in suite(name, 128, "float16", "NHWC").values()}
    jobs, *requests = seen
    assert jobs == 3
    assert len(requests) == len(wanted)
    assert {request.problem for request in requests} == wanted
    assert {request.target.arch for request in requests} == {"sm_90a"}
    assert result.stdout.splitlines()[-1].startswith(f"{len(wanted)} problems: 0 record")


@pytest.mark.parametrize(
    ("words", "message"),
    [((), "nothing to compile"), (("--suite", "gone"), "suite='gone'")],
)
def test_refusals(words, message):
    result = _compile(*words, "--target", "llvm")
    assert result.exit_code == 2
    assert message in result.output
