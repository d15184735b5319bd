"""The script that measures what a call costs the host."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "host_cost.py"


@pytest.mark.parametrize("epilogue", [False, True])
def test_it_times_every_way_to_call(epilogue, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler here (Debian: apt-get install g++)")
    path = tmp_path / "record.json"
    command = [sys.executable, SCRIPT, "--batches", "4", "--calls", "20", "--json", path]
    done = subprocess.run(
        [*command, *["--epilogue"] * epilogue], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    assert record["kind"] == "host-cost" and record["environment"]["versions"]["torch"]
    assert record["epilogue"]["bias"] == epilogue
    assert (record["batches"], record["calls_per_batch"]) == (4, 20)
    costs = record["host_us_per_call"]
    assert len(costs) == 10
    for name, cost in costs.items():
        assert 0 < cost["lower"] <= cost["median"] <= cost["upper"]
        assert f"{name:36} {cost['median']:7.2f} " in done.stdout


def test_batches_that_fill_the_queue_are_refused():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--calls", "501"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "--calls: from 1 to 500" in done.stderr
