"""One process a host of a `Network`, a rank each of one Gloo group, that runs functions on request.

As `moe_fx.testing.RankPool`, but each rank is on a host of its own. What the functions keep in
module state lives until the ranks end.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any, Concatenate, TypeVar

import moe_fx
from moe_fx.errors import MoeFxError
from tests.bench.netlab import Network

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
_GRACE = 10.0
"""Seconds that the other ranks have to answer once one has failed."""
_START_TIMEOUT = 240.0


class HostError(MoeFxError):
    """A function failed on a rank. The ranks are still in step if ``alive``; else they have ended,
    and the next `Hosts.run` starts new ones."""

    def __init__(self, summary: str, details: str, alive: bool) -> None:
        super().__init__(summary)
        self.details = details
        self.alive = alive


class Hosts:
    """The ranks of ``network``, started by the first `run`."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._log: IO[bytes] | None = None

    def run(
        self, fn: Callable[Concatenate[int, ...], T], *args: Any, timeout: float = 300.0
    ) -> list[T]:
        """``[fn(0, *args), fn(1, *args), ...]``, each computed on its host.

        ``fn`` is a module-level function; ``timeout`` is in seconds. Raises `HostError`.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((fn, args))
        return self._collect(timeout)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the ranks."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            try:
                process.wait(2.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes, self._connections = [], []
        if self._log is not None:
            self._log.close()
            self._log = None

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile(prefix="moe_fx_hosts_")  # noqa: SIM115
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        for host in range(self.network.hosts):
            ours, theirs = Pipe()
            process = subprocess.Popen(
                [
                    *self.network.command(host),
                    *(sys.executable, "-m", "tests.bench.hosts", str(theirs.fileno())),
                ],
                env={
                    **os.environ,
                    **self.network.environment(host),
                    "PYTHONPATH": path,
                    "TORCH_COMPILE_CACHE_KEY_TAG": _digest_of_sources(),
                },
                pass_fds=[theirs.fileno()],
                stdout=self._log,
                stderr=subprocess.STDOUT,
            )
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._collect(_START_TIMEOUT)

    def _collect(self, timeout: float) -> list[Any]:
        answers: dict[int, Any] = {}
        failed: dict[int, str] = {}
        silent = set(range(self.network.hosts))
        deadline = time.monotonic() + timeout
        try:
            while silent and (remaining := deadline - time.monotonic()) > 0:
                ready = wait([self._connections[host] for host in silent], remaining)
                for host in sorted(silent):
                    if self._connections[host] in ready:
                        silent.discard(host)
                        try:
                            good, value = self._connections[host].recv()
                        except EOFError:
                            good, value = False, f"the process ended\n{self._printed()}"
                        (answers if good else failed)[host] = value
                if failed:
                    deadline = min(deadline, time.monotonic() + _GRACE)
        except BaseException:
            self._kill()
            raise
        if not failed and not silent:
            return [answers[host] for host in sorted(answers)]
        alive = not silent and all("the process ended" not in text for text in failed.values())
        details = "\n".join(f"rank {host}:\n{text}" for host, text in sorted(failed.items()))
        if silent:
            details += f"\nranks {sorted(silent)} had not answered after {timeout:g} s"
        if not alive:
            self._kill()
        raise HostError(_last_line(failed) or details.strip(), details, alive)

    def _printed(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        return self._log.read()[-4000:].decode(errors="replace")

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        self.close()


def _digest_of_sources() -> str:
    """torch's compile caches do not see that an op of ours was edited; with this they do."""
    assert moe_fx.__file__ is not None
    files = sorted(Path(moe_fx.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _last_line(failed: dict[int, str]) -> str:
    """The exception's own words, without the traceback."""
    for text in failed.values():
        lines = [line for line in text.splitlines() if line and not line.startswith((" ", "\t"))]
        said = [line for line in lines if "Error" in line.split(":")[0]]
        return (said or lines or [text])[-1]
    return ""


def _serve(connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    faulthandler.enable()
    torch.set_num_threads(1)

    def attempt(call: Callable[..., Any], *args: Any) -> None:
        try:
            connection.send((True, call(*args)))
        except Exception:
            connection.send((False, traceback.format_exc()))

    attempt(dist.init_process_group, "gloo")
    rank = dist.get_rank()
    while True:
        try:
            fn, args = connection.recv()
        except EOFError:
            break
        attempt(fn, rank, *args)
    os._exit(0)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
