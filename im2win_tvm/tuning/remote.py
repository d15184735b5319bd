"""Measuring servers as a session sees them: what a server does, and where servers come from."""

from __future__ import annotations

import os
import secrets
import socket
import struct
import subprocess
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tvm import rpc
from tvm.rpc import base

from .. import cuda_driver
from ..bench.timing import Limits
from ..problem import ConvProblem
from .measuring import Measurement, TuningError
from .messages import DESCRIBE, MEASURE, Asked, Description, results
from .server import KEY

__all__ = ["LocalServer", "Offer", "RemoteServer", "Tracker", "gpus"]

#: What a place of servers offers: its name, and what connects to it.
Offer = tuple[str, Callable[[], "RemoteServer"]]


class RemoteServer:
    """A session with a server: nobody else measures there until it ends. Calls wait for answers."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._measure = session.get_function(MEASURE)
        self.description = Description.of(session.get_function(DESCRIBE)())

    def measure(
        self, problem: ConvProblem, libraries: list[bytes], limits: Limits
    ) -> list[Measurement] | str:
        """As Measurer.measure on the server's device; why not, where that raises TuningError.

        libraries: the contents of exported kernels. Raises MessageError where the answer is none,
        and what TVM raises where the server is gone.
        """
        names = [f"{uuid.uuid4().hex}.so" for _ in libraries]
        for name, library in zip(names, libraries, strict=True):
            self._session.upload(bytearray(library), target=name)
        text = str(self._measure(Asked(problem, names, limits).text()))
        for name in names:
            self._session.remove(name)
        return results(text, len(libraries))


class LocalServer:
    """A server on this machine, started here, for this process alone; it ends with it.

    gpu: the index among those that CUDA shows to this process; None on a CPU.
    """

    def __init__(self, kind: str, gpu: int | None = None) -> None:
        self.name = "local server" if gpu is None else f"local server of GPU {gpu}"
        # A secret, since any user of this machine may reach the port.
        self._key = secrets.token_hex(16)
        environment = {**os.environ, KEY: self._key}
        if gpu is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
        command = [sys.executable, "-m", "im2win_tvm.tuning.server", "--with-parent"]
        self.process = subprocess.Popen(
            [*command, "--kind", kind],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for this process to handle
        )

    def offers(self, offer: Callable[[Offer], None]) -> None:
        """Offer itself, once."""
        offer((self.name, self._connect))

    def _connect(self) -> RemoteServer:
        port = self.process.stdout.readline()
        if not port:
            raise TuningError(f"{self.name}: ended at once, with exit code {self.process.wait()}")
        return RemoteServer(rpc.connect("127.0.0.1", int(port), self._key))

    def close(self) -> None:
        """End it, whatever it is doing."""
        self.process.stdin.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Tracker:
    """The servers of a key at a TVM RPC tracker: those that are free, as long as it is open.

    Whoever reaches a tracker can use its servers: see the module `server`.
    """

    def __init__(self, address: tuple[str, int], key: str) -> None:
        self._host = "{}:{}".format(*address)
        self._key = key
        try:
            self._socket = socket.create_connection(address, timeout=10.0)
            self._socket.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
            (magic,) = struct.unpack("<i", base.recvall(self._socket, 4))
        except OSError as error:
            raise TuningError(f"tracker={self._host}: cannot be reached: {error}") from None
        if magic != base.RPC_TRACKER_MAGIC:
            raise TuningError(f"tracker={self._host}: is something else than a TVM RPC tracker")
        self._socket.settimeout(None)
        self.name = f"tracker {self._host}"

    def offers(self, offer: Callable[[Offer], None]) -> None:
        """Offer servers as they come free, until it is closed or gone."""
        # One waits at the tracker until there is one.
        while True:
            base.sendjson(self._socket, [base.TrackerCode.REQUEST, self._key, "im2win", 1])
            code, (host, port, match) = base.recvjson(self._socket)
            if code != base.TrackerCode.SUCCESS:
                raise TuningError(f"{self.name}: refuses a server of the key {self._key!r}")

            def connect(host: str = host, port: int = port, match: str = match) -> RemoteServer:
                return RemoteServer(rpc.connect(host, port, match))

            offer((f"{host}:{port}", connect))

    def close(self) -> None:
        """Take no further servers."""
        with suppress(OSError):  # it may be gone
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def gpus(text: str) -> list[int]:
    """The GPUs that ``all`` or a list of indices such as ``0,1`` means. Raises TuningError."""
    count = 0
    while cuda_driver.device_name(count) is not None:
        count += 1
    here = [str(index) for index in range(count)]
    asked = here if text == "all" else [entry.strip() for entry in text.split(",")]
    wrong = [entry for entry in asked if entry not in here]
    if wrong or not asked or len(set(asked)) < len(asked):
        allowed = f"'all', or some of {','.join(here)}" if here else "nothing: no GPU is here"
        raise TuningError(f"local-gpus={text!r}: allowed: {allowed}")
    return [int(entry) for entry in asked]
