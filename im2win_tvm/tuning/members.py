"""The servers of a fleet: each has a thread that talks to it, and tells by events what it heard."""

from __future__ import annotations

import math
import queue
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..bench.timing import Limits
from ..problem import ConvProblem
from .measuring import Measurement
from .messages import Description
from .remote import Offer

__all__ = ["CONNECTING", "Event", "Member", "Task"]

#: Seconds for a server to start and to connect, or for one to come free.
CONNECTING = 120.0


@dataclass(eq=False)
class Task:
    """Kernels that are measured together on one server; index: their place among others."""

    problem: ConvProblem
    libraries: list[Path]
    limits: Limits
    index: int = 0
    lost: list[str] = field(default_factory=list)


class Member:
    """A server and the thread that talks to it."""

    def __init__(self, offer: Offer, events: queue.SimpleQueue[Event]) -> None:
        self.name, self._connect = offer
        self._events = events
        self._inbox: queue.SimpleQueue[tuple[Task, list[bytes]] | None] = queue.SimpleQueue()
        self.task: Task | None = None
        self.problem: ConvProblem | None = None
        self.deadline = time.monotonic() + CONNECTING
        # A daemon: one whose server never answers must not keep the interpreter.
        self.thread = threading.Thread(target=self._talk, daemon=True, name=self.name)
        self.thread.start()

    def give(self, task: Task | None, deadline: float = math.inf) -> None:
        """Have a task measured; None ends the session with the server."""
        self.task, self.deadline = task, deadline
        # Read now: whoever ends a search early removes its files.
        libraries = [path.read_bytes() for path in task.libraries] if task else []
        self._inbox.put((task, libraries) if task else None)

    def _talk(self) -> None:
        try:
            server = self._connect()
            self._events.put(Event(self, server.description))
            while (given := self._inbox.get()) is not None:
                task, libraries = given
                what = server.measure(task.problem, libraries, task.limits)
                self._events.put(Event(self, what))
        except Exception as error:
            self._events.put(Event(self, error))


class Event(NamedTuple):
    """What a server told: who it is, measurements, why there are none, or that it is gone."""

    member: Member
    what: Description | list[Measurement] | str | Exception
