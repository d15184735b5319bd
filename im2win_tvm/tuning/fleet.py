"""Measuring on many devices of one kind, in the place of the one Measurer of a session.

Each server has a thread that talks to it and waits. The session's own thread gives out kernels in
order, takes what comes, and drops a server that is gone or does not answer in time; what such a one
had goes to another. A kernel that crashes or hangs costs no server: there it runs in a process of
its own, as it would here.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import __version__, environment
from ..bench.timing import Limits
from ..problem import ConvProblem
from ..target import CudaTarget, Target
from .lookup import arch_of
from .measuring import PATIENCE, PREPARATION, Measurement, TuningError, first_line
from .members import CONNECTING, Event, Member, Task
from .messages import Description
from .remote import LocalServer, Offer, Tracker

__all__ = ["Fleet"]

#: Servers that kernels may lose before these count as what is wrong.
LOSSES = 2
_LOG = logging.getLogger(__name__)


class Fleet:
    """Measures kernels on all servers of some places; a context manager like Measurer.

    target: what the kernels are for; servers with another device than its own are left out. One
    that names no device takes that of the first server. places: LocalServer, Tracker. patience: as
    of Measurer, beyond what its own takes. Raises TuningError where no server can be had.
    """

    def __init__(
        self,
        target: Target,
        places: Sequence[LocalServer | Tracker],
        patience: float = PATIENCE,
        preparation: float = PREPARATION,
    ) -> None:
        self.target = target
        self.driver: str | None = None
        self.lost: list[str] = []
        self._places = places
        self._patience, self._preparation = patience, preparation
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._offers: queue.SimpleQueue[Offer] = queue.SimpleQueue()
        self._members: list[Member] = []  # of which a deadline says that something is awaited
        self._losses: Counter[str] = Counter()
        self._waiting: deque[Task] = deque()
        self._open: set[Task] = set()
        self._looking = [
            threading.Thread(target=self._look, args=(place,), daemon=True) for place in places
        ]
        for thread in self._looking:
            thread.start()
        try:
            while not self._idle():
                self._happen()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def width(self) -> int:
        """Kernels that are worth having ready at once."""
        return 2 * max(1, len(self._members))

    def close(self) -> None:
        """End all sessions with servers, and the servers that were started here."""
        self._open.clear()
        for member in self._members:
            member.give(None)
        for place in self._places:
            place.close()
        for member in self._members:
            # One that waits for another machine is left to it.
            member.thread.join(1.0)
        self._members.clear()

    def measure(
        self, problem: ConvProblem, libraries: list[Path], limits: Limits
    ) -> list[Measurement]:
        """As Measurer.measure: all on one server, by turns."""
        ((_, measured),) = self._results([Task(problem, libraries, limits)])
        return measured

    def each(
        self, problem: ConvProblem, libraries: Iterable[Path], limits: Limits
    ) -> Iterator[Measurement]:
        """Measure kernels one by one, each on any server; their results in order.

        libraries: asked for the next only when a server is free, so that others are built meanwhile
        by processes of their own. Raises TuningError where the problem cannot be measured.
        """
        tasks = (Task(problem, [path], limits, index) for index, path in enumerate(libraries))
        ready: dict[int, Measurement] = {}
        given = 0
        for index, (measured,) in self._results(tasks):
            ready[index] = measured
            while given in ready:
                yield ready.pop(given)
                given += 1

    def _results(self, tasks: Iterable[Task]) -> Iterator[tuple[int, list[Measurement]]]:
        """What comes of tasks, as it comes; what is still open when it is closed is forgotten."""
        source: Iterator[Task] | None = iter(tasks)
        try:
            while source is not None or self._open:
                for member in self._idle():
                    if not self._waiting and source is not None:
                        task = next(source, None)
                        if task is None:
                            source = None
                        else:
                            self._open.add(task)
                            self._waiting.append(task)
                    if self._waiting:
                        self._give(member, self._waiting.popleft())
                if self._open or not self._idle():
                    yield from self._happen()
        finally:
            self._open.clear()
            self._waiting.clear()

    def _idle(self) -> list[Member]:
        return [member for member in self._members if member.deadline == math.inf]

    def _give(self, member: Member, task: Task) -> None:
        seconds = len(task.libraries) * (self._patience + task.limits.warmup + task.limits.seconds)
        if len(task.libraries) > 1:
            seconds *= 2  # those with an error are measured once more
        if task.problem != member.problem:
            seconds += self._preparation
            member.problem = task.problem
        member.give(task, time.monotonic() + seconds + self._patience)

    def _happen(self) -> list[tuple[int, list[Measurement]]]:
        """Wait until something happens: results, if that is what did.

        Raises TuningError where a problem cannot be measured, and where no server is left.
        """
        with suppress(queue.Empty):
            while True:
                self._join(self._offers.get_nowait())
        if not self._members and not any(thread.is_alive() for thread in self._looking):
            raise TuningError(f"no measuring server is left: {'; '.join(self.lost) or 'none came'}")
        begun = time.monotonic()
        if not self._members:
            try:
                self._join(self._offers.get(timeout=CONNECTING))
            except queue.Empty:
                names = ", ".join(place.name for place in self._places)
                reasons = "".join(f"; {reason}" for reason in self.lost)
                raise TuningError(
                    f"no measuring server came free within {CONNECTING:.0f} s: {names}{reasons}"
                ) from None
            return []
        wait = min(member.deadline for member in self._members) - begun
        try:
            # New offers are looked at every second.
            member, what = self._events.get(timeout=min(max(wait, 0.0), 1.0))
        except queue.Empty:
            now = time.monotonic()
            late = [member for member in self._members if member.deadline <= now]
            return [entry for member in late for entry in self._drop(member, "does not answer")]
        if member not in self._members:  # dropped already, and late
            return []
        return self._take(member, what)

    def _take(self, member: Member, what: Any) -> list[tuple[int, list[Measurement]]]:
        task, member.task, member.deadline = member.task, None, math.inf
        if isinstance(what, Description):
            reason = self._unlike(what)
            return [] if reason is None else self._drop(member, reason)
        if isinstance(what, Exception):
            member.task = task
            return self._drop(member, first_line(what))
        if task not in self._open:
            return []  # of a search that was ended
        if isinstance(what, str):
            # Another server may have the memory that this one lacks.
            if task.lost or len(self._members) == 1:
                raise TuningError(f"{member.name}: {what}")
            member.task = task
            return self._drop(member, what)
        self._open.discard(task)
        return [(task.index, what)]

    def _join(self, offer: Offer) -> None:
        # One that was lost before may be measuring still, or about to be lost again.
        if self._losses[offer[0]] < LOSSES:
            self._members.append(Member(offer, self._events))

    def _drop(self, member: Member, reason: str) -> list[tuple[int, list[Measurement]]]:
        """Do without a server; what it had waits again, or counts as failed."""
        self._members.remove(member)
        self._losses[member.name] += 1
        self.lost.append(f"{member.name}: {reason}")
        _LOG.warning("measuring server lost: %s", self.lost[-1])
        task, member.task = member.task, None
        member.give(None)
        if task not in self._open:
            return []
        task.lost.append(self.lost[-1])
        if len(task.lost) < LOSSES:
            self._waiting.appendleft(task)
            return []
        self._open.discard(task)
        error = f"lost its server {LOSSES} times: {'; '.join(task.lost)}"
        return [(task.index, [Measurement(error)] * len(task.libraries))]

    def _unlike(self, server: Description) -> str | None:
        """Why a server cannot take part; None if it can."""
        device = environment.device_name(self.target)
        here = {
            "version": (server.version, __version__),
            "kind": (server.kind, self.target.kind),
            "arch": (server.arch, arch_of(self.target)),
            "device": (server.device, device or server.device),
            "driver": (server.driver, self.driver or server.driver),
        }
        for name, (theirs, ours) in here.items():
            if theirs != ours:
                return f"{name}={theirs!r}: the fleet measures with {ours!r}"
        if device is None and isinstance(self.target, CudaTarget):
            self.target = replace(self.target, device=server.device)
        self.driver = server.driver
        return None

    def _look(self, place: LocalServer | Tracker) -> None:
        """Take what a place offers, until it has no more."""
        with suppress(Exception):  # closed, or a tracker that is gone: what there is goes on
            place.offers(self._offers.put)
