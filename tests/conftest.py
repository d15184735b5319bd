"""Markers: `slow` runs with --slow only, `gpu` where PyTorch sees a CUDA device.

--record FILE writes what ran where, and what failed, as JSON: the evidence for runs that not every
machine can repeat.
"""

import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

STARTED = pytest.StashKey()
MARKERS = {
    "slow": "more of the same, for nightly runs: --slow runs it",
    "nvcc": "compiles with nvcc; skipped where there is none",
    "gpu": "runs kernels on a CUDA device through PyTorch",
}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--record", metavar="FILE", type=Path, help="write a JSON record of the run")


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    config.stash[STARTED] = time.time()
    # Records of the developer's own would decide what is compiled where a test names nothing.
    os.environ.pop("IM2WIN_TUNING_LOGS", None)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]
    on_gpu = [item for item in items if "gpu" in item.keywords]
    reason = _no_gpu() if on_gpu else None
    if reason:
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter, config):
    path = config.getoption("--record")
    if path is None:
        return
    from im2win_tvm import environment
    from im2win_tvm.target import resolve

    outcomes = {
        name: [report.nodeid for report in terminalreporter.getreports(name)]
        for name in ("passed", "failed", "error", "skipped")
    }
    passed = Counter(nodeid.split("[")[0] for nodeid in outcomes["passed"])
    figures = {
        "seconds": round(time.time() - config.stash[STARTED], 1),
        "counts": {name: len(nodeids) for name, nodeids in outcomes.items()},
        "passed": dict(sorted(passed.items())),
        **{name: outcomes[name] for name in ("failed", "error", "skipped")},
    }
    command = ["python", "-m", "pytest", *sys.argv[1:]]
    environment.write_record(path, "tests", command, resolve(), figures)


def _no_gpu():
    """Why no GPU test can run here, or None."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return None
