"""`RankPool`: a group of persistent rank processes on this machine.

::

    def reduced(rank: int, value: float) -> torch.Tensor:  # at module level: ranks import it
        mine = torch.tensor(value + rank)
        dist.all_reduce(mine)
        return mine

    with RankPool(2) as pool:
        first, second = pool.run(reduced, 1.0)

A failing or hanging rank never hangs the caller: `RankError` says which ranks failed, how, and
where the ranks that had not answered stood.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Concatenate, TypeVar

import torch
import torch.distributed as dist

from moe_fx.errors import MoeFxError

__all__ = ["RankError", "RankPool", "run_ranks"]

T = TypeVar("T")

_START_TIMEOUT = 180.0
"""Seconds for every rank to import torch and join the process group."""
_GRACE = 2.0
"""Seconds the other ranks have to answer once one has failed."""
_CLOSE_TIMEOUT = 5.0
"""Seconds for idle ranks to leave on their own."""
_ORPHAN_AFTER = 30.0
"""Seconds past its timeout after which a rank that nobody has killed ends itself."""


class RankError(MoeFxError):
    """At least one rank did not return a result.

    failed: each failing rank's traceback. silent: where each rank stood that had not answered (as a
    rule it waits in a collective for one that failed). on_purpose: of the failing ranks, what those
    said that failed by an error which moe_fx raises on purpose.
    """

    def __init__(
        self,
        summary: str,
        failed: dict[int, str],
        silent: dict[int, str],
        on_purpose: dict[int, str],
    ) -> None:
        super().__init__(summary, failed, silent, on_purpose)
        self.summary = summary
        self.failed = failed
        self.silent = silent
        self.on_purpose = on_purpose

    @property
    def brief(self) -> str:
        """For users: what was raised on purpose, said once, without tracebacks; otherwise all."""
        if not self.on_purpose:
            return str(self)
        return "\n".join(f"{text} (on {who})" for who, text in _alike(self.on_purpose))

    def __str__(self) -> str:
        parts = [self.summary]
        parts += [f"{who} failed:\n{text}" for who, text in _alike(self.failed)]
        parts += [f"{who} stood at:\n{text}" for who, text in _alike(self.silent)]
        return "\n\n".join(part.rstrip() for part in parts)


class RankPool:
    """``world_size`` processes, one rank each of a process group, that run functions on request.

    The ranks start at the first `run`, and again at the next `run` after one has failed. Between
    runs a rank resets Dynamo, its default random generator and the garbage; process groups that a
    function makes stay until `close`.
    """

    def __init__(self, world_size: int, backend: str = "gloo") -> None:
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        self.world_size = world_size
        self.backend = backend
        self._ranks: list[_Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(
        self, fn: Callable[Concatenate[int, ...], T], *args: Any, timeout: float = 120.0
    ) -> list[T]:
        """``[fn(0, *args), ..., fn(world_size - 1, *args)]``, each computed on its rank.

        ``fn`` is a module-level function; arguments and results are copied. ``timeout`` is in
        seconds and does not count the start of the processes.
        """
        request = pack((fn, args, timeout))
        try:
            if not self._ranks:
                self._start()
                self._collect(_START_TIMEOUT)
            for rank in self._ranks:
                rank.send(request)
            answers = self._collect(timeout)
        except BaseException:  # the ranks may be anywhere, after Ctrl-C too
            self._end(patience=0.0)
            raise
        return [_unpack(answer) for answer in answers]

    def close(self) -> None:
        """End the ranks. A later `run` starts new ones."""
        self._end(patience=_CLOSE_TIMEOUT)

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _end(self, patience: float) -> None:
        """A rank leaves once its connection closes, or is killed ``patience`` seconds later."""
        deadline = time.monotonic() + patience
        for rank in self._ranks:
            rank.connection.close()
        for rank in self._ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
            rank.process.kill()
            rank.process.join()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="moe_fx_ranks_")
        folder = Path(self._folder.name)
        for index in range(self.world_size):
            ours, theirs = context.Pipe()
            stacks = folder / f"stacks_{index}.txt"
            process = context.Process(
                target=_serve,
                args=(index, self.world_size, self.backend, folder / "store", stacks, theirs),
                name=f"rank {index} of {self.world_size}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours, stacks))

    def _collect(self, timeout: float) -> list[bytes]:
        """Every rank's packed answer, or `RankError`."""
        answers: dict[int, bytes] = {}
        failed: dict[int, str] = {}
        on_purpose: dict[int, str] = {}
        silent = set(range(self.world_size))
        deadline = time.monotonic() + timeout
        while silent:
            waiting: dict[Any, int] = {self._ranks[index].connection: index for index in silent}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                index = waiting[connection]
                silent.remove(index)
                answer = self._ranks[index].receive()
                if answer.error:
                    failed[index] = answer.error
                    deadline = min(deadline, time.monotonic() + _GRACE)
                else:
                    answers[index] = answer.packed
                if answer.on_purpose:
                    on_purpose[index] = answer.on_purpose
        if failed or silent:
            summary = _summary(sorted(failed), sorted(silent), self.world_size, timeout)
            stacks = {index: self._ranks[index].stacks() for index in sorted(silent)}
            raise RankError(summary, failed, stacks, on_purpose)
        return [answers[index] for index in range(self.world_size)]


def run_ranks(
    world_size: int,
    fn: Callable[Concatenate[int, ...], T],
    *args: Any,
    timeout: float = 120.0,
    backend: str = "gloo",
) -> list[T]:
    """`RankPool.run` on ranks that live for this call."""
    with RankPool(world_size, backend) as pool:
        return pool.run(fn, *args, timeout=timeout)


@dataclass(frozen=True)
class _Answer:
    """packed: the result, if ``error`` is "", else the traceback. on_purpose: what the error says,
    if it is one that moe_fx raises on purpose."""

    packed: bytes = b""
    error: str = ""
    on_purpose: str = ""


@dataclass(frozen=True)
class _Rank:
    """The caller's side of a rank. ``stack_file`` receives its stacks on SIGUSR1 or a crash."""

    process: SpawnProcess
    connection: Connection
    stack_file: Path

    def send(self, request: bytes) -> None:
        with contextlib.suppress(OSError):  # it has died: `receive` will say so
            self.connection.send_bytes(request)

    def receive(self) -> _Answer:
        try:
            answer: _Answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            died = f"the process died, exit code {self.process.exitcode}\n{self._written()}"
            return _Answer(error=died)
        return answer

    def stacks(self) -> str:
        """Where each of the rank's Python threads stands."""
        if not self.stack_file.exists() or self.process.pid is None:
            return "(the process had not started yet)"
        os.kill(self.process.pid, signal.SIGUSR1)
        text, deadline = "", time.monotonic() + 1.0
        while time.monotonic() < deadline:
            time.sleep(0.05)
            before, text = text, self._written()
            if text and text == before:
                break
        return text or "(the process did not write its stacks)"

    def _written(self) -> str:
        return self.stack_file.read_text() if self.stack_file.exists() else ""


def _serve(
    index: int, world_size: int, backend: str, store: Path, stack_file: Path, connection: Connection
) -> None:
    """A rank's main: joins the process group, then answers requests until the caller is gone."""
    torch.set_num_threads(1)

    def join() -> None:
        files = dist.FileStore(str(store), world_size)
        dist.init_process_group(backend, store=files, rank=index, world_size=world_size)

    with open(stack_file, "w") as stacks:
        faulthandler.enable(stacks)
        faulthandler.register(signal.SIGUSR1, stacks)
        connection.send(_attempt(join))
        while True:
            try:
                request = connection.recv_bytes()
            except EOFError:
                break
            connection.send(_attempt(_perform, index, request, stacks))
            gc.collect()
        dist.destroy_process_group()


def _perform(index: int, request: bytes, stacks: IO[str]) -> Any:
    fn, args, timeout = _unpack(request)
    torch.compiler.reset()
    torch.manual_seed(0)
    faulthandler.dump_traceback_later(timeout + _ORPHAN_AFTER, file=stacks, exit=True)
    try:
        return fn(index, *args)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _attempt(call: Callable[..., Any], *args: Any) -> _Answer:
    try:
        return _Answer(pack(call(*args)))
    except Exception as error:
        meant = getattr(error, "inner_exception", error)  # torch.compile wraps what backends raise
        said = str(meant) if isinstance(meant, MoeFxError) else ""
        return _Answer(error=traceback.format_exc(), on_purpose=said)


def pack(value: Any) -> bytes:
    """Bytes, not shared memory: a tensor in flight outlives the rank that sent it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _alike(texts: dict[int, str]) -> list[tuple[str, str]]:
    """(which ranks, their text), a text that several have once."""
    having: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        having.setdefault(text, []).append(rank)
    return [
        (f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}", text)
        for text, ranks in having.items()
    ]


def _summary(failed: list[int], silent: list[int], world_size: int, timeout: float) -> str:
    if not failed:
        return f"timed out: of {world_size} ranks, {silent} had not answered after {timeout:g} s"
    waiting = f"; {silent} had not answered {_GRACE:g} s later" if silent else ""
    return f"of {world_size} ranks, {failed} failed{waiting}"
