"""What is installed: the schedules and the tuning records are files of the package."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tuning_records import H100, PROBLEM, make, write

from im2win_tvm.bench.baselines import metaschedule

ROOT = Path(__file__).parents[1]
PARTS = ("im2win_tvm", "schedules", "tuning_logs", "pyproject.toml", "README.md", "LICENSE")

# What an installed package finds, in a process that sees nothing else of this tree.
FIND = """
from im2win_tvm import ConvProblem
from im2win_tvm.bench.baselines import metaschedule
from im2win_tvm.select import select
from im2win_tvm.target import CudaTarget
from im2win_tvm.tuning import lookup
print(lookup.SHIPPED.resolve())
problem = ConvProblem(1, 3, (9, 8), 5, 3, padding=1)
target = CudaTarget("sm_90", "NVIDIA H100")
print(select(problem, target).origin)
folder = metaschedule.folder(problem, target)
print(metaschedule.has_records(folder), folder.resolve())
"""
# What a folder of the competitor `tvm-tuned` holds.
TUNED = ("database_workload.json", "database_tuning_record.json", "provenance.jsonl")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this tree, with one more record, and those of a `tvm-tuned` problem."""
    setuptools = pytest.importorskip("setuptools")
    pytest.importorskip("pip")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} is older than pyproject.toml asks for")
    tree = tmp_path_factory.mktemp("tree")
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, tree / part, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / part, tree / part)
    write(tree / "tuning_logs", make(2.0, target=H100, schedule="cuda_simt"), name="test")
    folder = metaschedule.folder(PROBLEM, H100, tree / "tuning_logs")
    folder.mkdir(parents=True)
    for name in TUNED:
        (folder / name).write_text("{}\n")
    command = [sys.executable, "-m", "pip", "wheel", str(tree), "--no-deps"]
    done = subprocess.run(
        [*command, "--no-build-isolation", "--quiet", "-w", str(tree / "dist")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "dist").glob("*.whl")
    return path


def test_the_wheel_holds_schedules_and_records_as_files(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = {
        f"im2win_tvm/{folder}/{path.relative_to(ROOT / folder)}"
        for folder, pattern in (
            ("schedules", "*.py"),
            ("tuning_logs", "*/*.jsonl"),
            ("tuning_logs", "*/metaschedule/*/*"),
        )
        for path in (ROOT / folder).glob(pattern)
    }
    assert len(tracked) >= 3
    assert tracked <= names
    assert {"im2win_tvm/tuning_logs/README.md", "im2win_tvm/tuning/lookup.py"} <= names
    assert "im2win_tvm/tuning_logs/nvidia-h100/test.jsonl" in names
    folder = metaschedule.folder(PROBLEM, H100, Path("im2win_tvm/tuning_logs"))
    assert {str(folder / name) for name in TUNED} <= names


def test_an_installed_package_finds_its_records(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "IM2WIN_TUNING_LOGS"}
    done = subprocess.run(
        [sys.executable, "-c", FIND],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    place, origin, tuned = done.stdout.splitlines()
    installed = (tmp_path / "im2win_tvm" / "tuning_logs").resolve()
    assert Path(place) == installed
    assert tuned == f"True {metaschedule.folder(PROBLEM, H100, installed)}"
    record = Path("tuning_logs", "nvidia-h100", "test.jsonl")
    assert origin == f"record {record}:1, 2.00 us on 'NVIDIA H100'"


def test_this_tree_finds_the_top_level_folder():
    from im2win_tvm.tuning import lookup

    assert lookup.SHIPPED.resolve() == (ROOT / "tuning_logs").resolve()
