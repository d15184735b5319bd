"""What a simulation reports: a fault, and the place in the program that it names."""

from typing import Any


class SimulationError(RuntimeError):
    """A fault of the kernel, or something in it that is not simulated.

    `statement` is TVMScript; `block` and `thread` are blockIdx and threadIdx (x, y, z) of the first
    thread at fault, None where no thread is to blame; `address` is in bytes from the start of the
    array or of the block's shared memory.
    """

    def __init__(self, message: str, statement: str = "", block=None, thread=None, address=None):
        super().__init__(message)
        self.statement = statement
        self.block, self.thread, self.address = block, thread, address


class Site:
    """A statement and the loops around it, for messages."""

    _LONGEST = 200

    def __init__(self, node: Any, loops: tuple[tuple[str, int], ...], env: list):
        self._node, self._loops, self._env = node, loops, env
        self._text: str | None = None

    def __str__(self) -> str:
        if self._text is None:
            # The script declares the variables first; the statement is the last line.
            self._text = str(self._node).strip().splitlines()[-1].strip()
        return self._text

    def fail(
        self,
        machine: Any,
        message: str,
        lane: int | None = None,
        address: int | None = None,
        over: bool = False,
    ):
        """Raise the error.

        `lane` counts the threads of the group of blocks that runs. `over`: the statement ended
        some time ago, and loops around it are elsewhere.
        """
        block = thread = None
        place = ""
        if lane is not None:
            block, thread = machine.coordinates(machine.gid[lane])
            place = f" by {machine.name(machine.gid[lane])}"
        if address is not None:
            place += f" at byte {address}"
        text = str(self)
        where = f" in `{text[: self._LONGEST]}{' ...' if len(text) > self._LONGEST else ''}`"
        if self._loops and not over:
            trips = (f"{name}={_shown(self._env[slot])}" for name, slot in self._loops)
            where += f" with {', '.join(trips)}"
        raise SimulationError(message + place + where, str(self), block, thread, address)


def _shown(value: Any) -> str:
    """A loop variable: a number, a range of them in a vector loop, or different by thread."""
    if type(value) is int:
        return str(value)
    return f"{value[0, 0]}..{value[-1, 0]}" if value.ndim == 2 else "(by thread)"
