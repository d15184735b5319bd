"""Markers: `slow` runs with --slow only, `gpu` where PyTorch sees a CUDA device."""

import pytest

MARKERS = {
    "slow": "more of the same, for nightly runs: --slow runs it",
    "nvcc": "compiles with nvcc; skipped where there is none",
    "gpu": "runs kernels on a CUDA device through PyTorch",
}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


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


def _no_gpu():
    """Why no GPU test can run here, or None."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return None
