"""Kernels kept in memory and on disk, for all processes."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from im2win_tvm import kernel_cache  # noqa: E402
from im2win_tvm.epilogue import Epilogue  # noqa: E402
from im2win_tvm.kernel_cache import KernelCache  # noqa: E402
from im2win_tvm.problem import ConvProblem  # noqa: E402
from im2win_tvm.target import resolve  # noqa: E402

PROBLEM = ConvProblem(1, 3, (6, 7), 4, 3)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where kernels of this test alone are kept."""
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def compiled_times(monkeypatch, cache, threads=1, **options):
    """How often the compiler is called for one kernel."""
    from im2win_tvm import compiler

    calls, real = [], compiler.compile

    def counted(*arguments, **keywords):
        calls.append(arguments)
        return real(*arguments, **keywords)

    monkeypatch.setattr(compiler, "compile", counted)
    target = resolve("llvm")
    workers = [
        threading.Thread(target=cache.get, args=(PROBLEM, target), kwargs=options)
        for _ in range(threads)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    kernel = cache.get(PROBLEM, target, **options)
    x, w = torch.ones(PROBLEM.input_shape), torch.ones(PROBLEM.weight_shape)
    if not options:
        assert (kernel(x, w) == 27).all()
    monkeypatch.setattr(compiler, "compile", real)
    return len(calls)


def test_cache_is_of_memory_and_disk(monkeypatch, folder):
    cache = KernelCache()
    assert compiled_times(monkeypatch, cache, threads=4) == 1
    assert compiled_times(monkeypatch, cache) == 0
    assert compiled_times(monkeypatch, KernelCache()) == 0
    [entry] = folder.iterdir()
    assert compiled_times(monkeypatch, KernelCache(), epilogue=Epilogue(activation="relu")) == 1
    # Cut short, then of another problem: both count as none, and are replaced.
    whole = entry.read_bytes()
    for wrong in (whole[:1000], b""):
        entry.unlink()
        entry.write_bytes(wrong)
        assert compiled_times(monkeypatch, KernelCache()) == 1
        assert len(entry.read_bytes()) == len(whole)


def test_cache_without_a_place(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(kernel_cache.VARIABLE, str(tmp_path / "file" / "folder"))
    assert compiled_times(monkeypatch, KernelCache()) == 1


def test_new_records_and_versions_are_other_kernels(monkeypatch, tmp_path):
    target = resolve("llvm")

    def name(accuracy=None):
        return kernel_cache._name(PROBLEM, target, accuracy, Epilogue())

    assert {"cpu_blocked.py", "kernel_cache.py"} <= {path.name for path in kernel_cache._files()}
    first = name()
    assert name() == first != name("tf32")
    logs = tmp_path / "logs" / "device"
    logs.mkdir(parents=True)
    (logs / "one.jsonl").write_text("{}\n")
    monkeypatch.setenv("IM2WIN_TUNING_LOGS", str(tmp_path / "logs"))
    second = name()
    assert second != first
    monkeypatch.setattr(kernel_cache, "package_version", lambda _: "0")
    assert name() not in (first, second)


def test_processes_share_a_cache(folder):
    code = (
        "import sys, torch, im2win_tvm.torch as ours\n"
        "y = ours.conv2d(torch.ones(1, 3, 6, 7), torch.ones(4, 3, 3, 3))\n"
        "sys.exit(not bool((y == 27).all()))\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code], cwd=Path(__file__).parents[1])
        for _ in range(2)
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    assert [path.suffix for path in folder.iterdir()] == [".so"]


def test_cache_without_a_home(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(kernel_cache.VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(kernel_cache.Path, "home", homeless)
    assert compiled_times(monkeypatch, KernelCache()) == 1
