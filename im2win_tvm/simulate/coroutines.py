"""Parts of a kernel that wait for each other: each a coroutine, of which one runs at any time.

A coroutine is a Python thread that runs while it holds the baton; it gives it back when it waits.
"""

import threading
from collections.abc import Callable

import numpy as np

from .errors import Site


class Wait:
    """What the lanes of a coroutine wait for: over once nothing is missing.

    what: says it, for messages. scattered: some warps of the coroutine are elsewhere, or wait for
    something else, so that on hardware they might go on.
    """

    def __init__(self, missing: int, what: Callable[[], str], site: Site, lane: int):
        self.missing, self.what, self.site, self.lane = missing, what, site, lane
        self.scattered = False


class Coroutine:
    """Some warps of a block. `held` is what they keep while others run."""

    def __init__(self, block: int, first: int, held: list):
        self.block, self.first, self.held = block, first, held
        self.wait: Wait | None = None
        self.error: BaseException | None = None
        self.ended = False
        self._turn = threading.Semaphore(0)


class _Abandoned(BaseException):
    """Unwinds a coroutine that will not go on."""


class Coroutines:
    """Runs coroutines in turn until all have ended."""

    def __init__(self):
        self._back = threading.Semaphore(0)
        self._abandoned = False
        self.current: Coroutine | None = None

    def wait(self, wait: Wait) -> None:
        """Called by the coroutine that runs: others run until the wait is over."""
        me = self.current
        assert me is not None
        if wait.missing:
            me.wait = wait
            self._back.release()
            me._turn.acquire()
            if self._abandoned:
                raise _Abandoned
            me.wait = None

    def run(
        self,
        coroutines: list[Coroutine],
        body: Callable[[], None],
        enter: Callable[[Coroutine], None],
        leave: Callable[[Coroutine], None],
        stuck: Callable[[list[Coroutine]], None],
    ) -> None:
        """Run `body` in each coroutine.

        enter, leave: called around each turn. stuck: called when all that are left wait; it ends
        some wait or raises.
        """
        threads = [threading.Thread(target=self._body, args=(c, body), daemon=True)
                   for c in coroutines]  # fmt: skip
        for thread in threads:
            thread.start()
        try:
            left = list(coroutines)
            while left:
                ready = [c for c in left if c.wait is None or not c.wait.missing]
                if not ready:
                    stuck(left)
                for c in ready:
                    self.current = c
                    enter(c)
                    c._turn.release()
                    self._back.acquire()
                    if c.error is not None:
                        raise c.error
                    leave(c)
                left = [c for c in left if not c.ended]
        finally:
            self._abandoned = True
            for c in coroutines:
                c._turn.release()
            for thread in threads:
                thread.join()
            self._abandoned = False

    def _body(self, me: Coroutine, body: Callable[[], None]) -> None:
        me._turn.acquire()
        try:
            if not self._abandoned:
                with np.errstate(all="ignore"):  # of this thread; see run()
                    body()
        except _Abandoned:
            return
        except BaseException as error:
            me.error = error
        me.ended = True
        if not self._abandoned:
            self._back.release()
