"""A measuring server: checks and times kernels of tuning sessions on the device of this process.

    python -m tvm.exec.rpc_tracker --host 10.0.0.1 --port 9190         # once, anywhere
    CUDA_VISIBLE_DEVICES=2 python -m im2win_tvm.tuning.server --host 10.0.0.2 \\
        --tracker 10.0.0.1:9190 --key h100                             # one for each GPU

It is TVM's RPC server with two functions more. Each session of a client is a process of its own,
and in it a Measurer runs the kernels in another one: what is measured, checked and timed out is
the same here as without a server, and only libraries and results cross the network.

Whoever reaches the port of a server runs what code they like as its user, and a tracker tells its
port and key to anyone who asks: both belong on a network whose every member is trusted. That is
why a server listens to its own machine alone unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import tvm_ffi
from tvm.rpc import server as rpc_server

from .. import __version__, environment, processes
from ..target import KINDS, Target, TargetError, resolve
from .lookup import arch_of
from .measuring import Measurer, TuningError
from .messages import DESCRIBE, MEASURE, Asked, Description, answer

__all__ = ["KEY", "Service", "address", "main"]

#: The environment variable with the key, which is a secret where there is no tracker.
KEY = "IM2WIN_SERVER_KEY"
# Seconds before a server whose session ended badly listens again.
_PAUSE = 1.0
_LOG = logging.getLogger(__name__)


class Service:
    """What a server does for a session; one object, of which each session's process has a copy."""

    def __init__(self, kind: str | None = None) -> None:
        self._kind = kind
        self._target: Target | None = None
        self._measurer: Measurer | None = None

    def register(self) -> None:
        """Offer the functions to sessions to come."""
        tvm_ffi.register_global_func(DESCRIBE, self.describe, override=True)
        tvm_ffi.register_global_func(MEASURE, self.measure, override=True)

    def describe(self) -> str:
        """A Description as JSON, or why there is none: no device of the kind is here."""
        try:
            target = self._here()
        except TargetError as error:
            return answer(str(error))
        return Description(
            host=socket.gethostname(),
            process=os.getpid(),
            kind=target.kind,
            arch=arch_of(target),
            device=environment.device_name(target) or target.arch,
            driver=self._started().driver,
            version=__version__,
        ).text()

    def measure(self, text: str) -> str:
        """Measurements of what is Asked, or why there are none, as JSON."""
        asked = Asked.of(text)
        # A session's working directory is the folder of what its client uploaded.
        libraries = [os.path.join(os.getcwd(), name) for name in asked.libraries]
        try:
            return answer(self._started().measure(asked.problem, libraries, asked.limits))
        except TuningError as error:
            return answer(str(error))

    def _started(self) -> Measurer:
        if self._measurer is None:
            self._measurer = Measurer(self._here().kind)
        return self._measurer

    def _here(self) -> Target:
        """The target of this machine. Raises TargetError where there is none of the kind.

        Asked in a process that was not forked: TVM and PyTorch may have begun to use CUDA when
        they were imported, and then it does not work in what is forked from there.
        """
        if self._target is None:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, context, processes.begin) as asking:
                self._target = asking.submit(resolve, self._kind).result()
        return self._target


def address(text: str) -> tuple[str, int]:
    """``host:port`` as a pair. Raises ValueError."""
    host, _, port = text.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ValueError(f"{text!r}: allowed: host:port, such as 10.0.0.1:9190")
    return host.strip("[]"), int(port)


def _end(*_: object) -> None:
    """End this process and those of its sessions; what these measure ends with them."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(0)


def _end_with_parent() -> None:
    # Not by sys.stdin: a session that is forked meanwhile closes that, and would wait for its lock.
    while os.read(0, 1):
        continue  # what arrives means nothing; the end of it does
    _end()


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(
        prog="python -m im2win_tvm.tuning.server", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--tracker", metavar="HOST:PORT", type=_address, help="default: none")
    parser.add_argument(
        "--key", default=os.environ.get(KEY, ""), help="of the device at the tracker, such as h100"
    )
    parser.add_argument("--kind", choices=KINDS, help="of target; default: what is here")
    parser.add_argument(
        "--host", default="127.0.0.1", help="to listen at, and to be reached at; %(default)s"
    )
    parser.add_argument("--port", type=int, default=9091, help="the first that is tried")
    parser.add_argument("--port-end", type=int, default=9190, help="the one after the last")
    parser.add_argument("--with-parent", action="store_true", help="end when stdin is closed")
    given = parser.parse_args()
    if not given.key:
        parser.error(f"--key: allowed: any name; or ${KEY}")
    # Sessions inherit the functions that are registered here.
    multiprocessing.set_start_method("fork")
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    Service(given.kind).register()
    if given.with_parent:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        state = rpc_server.PopenRPCServerState(
            given.host,
            given.port,
            given.port_end,
            tracker_addr=given.tracker,
            key=given.key,
            # Where none is told, a tracker tells clients the one that it sees.
            custom_addr=None if given.host in ("0.0.0.0", "::") else given.host,
            silent=given.with_parent,
            reuse_addr=False,  # a second server would share the port
        )
        print(state.port, flush=True)
        # Ends when the process of a session ended badly; a server goes on nevertheless.
        state.thread.join()
        _LOG.warning("a session ended badly; listening again")
        state.sock.close()
        time.sleep(_PAUSE)


def _address(text: str) -> tuple[str, int]:
    try:
        return address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    main()
