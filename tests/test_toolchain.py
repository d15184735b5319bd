"""Compilers that fail or never end: the error says what was run, and nothing of it stays."""

import time
from pathlib import Path

import pytest

from im2win_tvm import toolchain
from im2win_tvm.toolchain import ToolchainError

# As nvcc does: the work is a child's, which says who it is and holds the output open.
WAITING = ["sh", "-c", "sleep 30 & echo child $!; wait"]


def _gone(pid):
    """Whether a process ends within some seconds; nobody may be there to collect an orphan."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        try:
            if stat.read_text().rsplit(")", 1)[1].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to see processes in")
def test_a_compiler_that_does_not_end_is_ended_with_its_children(monkeypatch):
    monkeypatch.setattr(toolchain, "LIMIT", 0.5)
    start = time.monotonic()
    with pytest.raises(ToolchainError) as error:
        toolchain.run(WAITING)
    assert time.monotonic() - start < 20
    text, child = str(error.value).rsplit("child ", 1)
    assert text == f"{' '.join(WAITING)}\ntook more than 0.5 s and was ended; it printed:\n"
    assert _gone(int(child))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to see processes in")
def test_an_interrupt_ends_a_compiler_with_its_children(monkeypatch, tmp_path):
    """It runs in a group of its own, where Ctrl-C does not arrive."""
    pid = tmp_path / "pid"

    def interrupted(self, *arguments, **options):
        while not (pid.exists() and pid.read_text().endswith("\n")):
            time.sleep(0.01)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(toolchain.subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toolchain.run(["sh", "-c", f"sleep 30 & echo $! > {pid}; wait"])
    assert _gone(int(pid.read_text()))


def test_a_compiler_that_fails_or_is_missing():
    with pytest.raises(ToolchainError, match=r"^sh -c echo why; exit 3\nfailed:\nwhy\n$"):
        toolchain.run(["sh", "-c", "echo why; exit 3"])
    with pytest.raises(ToolchainError, match=r"^no-such-compiler: "):
        toolchain.run(["no-such-compiler"])
    assert toolchain.run(["echo", "fine"]) == "fine\n"
