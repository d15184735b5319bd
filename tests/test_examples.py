"""The programs of `examples`, as a newcomer runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAID = {
    "compile_and_call": ["output (1, 64, 56, 56)"],
    "export_and_load": ["C++: 27"],
    "relax_model": ["3 of 3 convolutions replaced", "C++: 10 outputs"],
    "pytorch_model": ["of 2 convolutions replaced"],
    "tune_your_layer": ["after: {'config'"],
}


def test_each_is_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == SAID.keys()


@pytest.mark.parametrize("name", SAID)
def test_example(name, tmp_path):
    if name in ("relax_model", "pytorch_model"):
        pytest.importorskip("torch", reason="PyTorch is not installed")
    environment = {**os.environ, "IM2WIN_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("IM2WIN_TUNING_LOGS", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "examples" / f"{name}.py"],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    if "no g++ here" in done.stderr:
        pytest.skip("no g++ here (Debian: apt-get install g++)")
    assert done.returncode == 0, done.stdout + done.stderr
    for said in SAID[name]:
        assert said in done.stdout
