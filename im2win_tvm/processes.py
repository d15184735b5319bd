"""What a process that works for another does first.

Imports nothing of the package: unpickling `begin` would otherwise import TVM, for seconds in which
Ctrl-C is not ignored yet.
"""

import multiprocessing
import os
import signal
import threading

__all__ = ["begin"]


def begin() -> None:
    """Leave Ctrl-C, which reaches the whole group of processes, to the parent; end when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    # One that was killed cannot tell its workers, which would wait for the next task forever.
    parent.join()
    os._exit(1)
