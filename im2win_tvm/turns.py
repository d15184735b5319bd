"""Taking turns on a device: of the processes that name one file, one has it at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["turn"]


@contextmanager
def turn(lock: Path | None) -> Iterator[None]:
    """Alone among those that name the same file, which is made; None waits for nobody.

    A process that ends, however it does, gives its turn back; processes that it had started may be
    at work a moment longer. Raises OSError where the file cannot be made or locked.
    """
    if lock is None:
        yield
        return
    import fcntl

    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # which gives the lock back
