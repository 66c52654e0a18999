"""What passes through ``torch.distributed.all_to_all_single``, by which the dialect's ops exchange:
kept and played back without a link, or watched with its times; and an exchange of rows by itself.

The former works by standing in for that function in this process, so the compiled program is the
same one, whatever is done to its exchanges.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

Exchange = Callable[..., Any]


def there_and_back(
    sent: Sequence[Tensor],
    arriving: Sequence[Tensor],
    returned: Sequence[Tensor],
    outgoing: Sequence[list[int] | None],
    incoming: Sequence[list[int] | None],
) -> None:
    """Pieces of rows: all are dispatched, and each sent back as it arrives. outgoing, incoming:
    rows of each piece to and from each rank (None: equal parts)."""
    dispatched = [
        dist.all_to_all_single(there, here, theirs, ours, async_op=True)
        for there, here, theirs, ours in zip(arriving, sent, incoming, outgoing, strict=True)
    ]
    combined = []
    for work, back, there, theirs, ours in zip(
        dispatched, returned, arriving, incoming, outgoing, strict=True
    ):
        work.wait()
        combined.append(dist.all_to_all_single(back, there, ours, theirs, async_op=True))
    for work in combined:
        work.wait()


class Recording:
    """What each exchange of one step delivered, in order."""

    def __init__(self) -> None:
        self.delivered: list[Tensor] = []

    @contextmanager
    def record(self) -> Iterator[None]:
        """Exchanges of the step that runs within are carried out, and what they deliver is kept."""
        self.delivered = []

        def exchange(original: Exchange, output: Tensor, *args: Any, **kwargs: Any) -> Any:
            work = original(output, *args, **kwargs)
            if work is not None:
                work.wait()
            self.delivered.append(output.clone())
            return None if work is None else _Done()

        with _instead(exchange):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Exchanges of the same step send nothing: each copies what it delivered before, which
        costs the time of the copy (about 1 ms for 4 MB)."""
        remaining = iter(self.delivered)

        def exchange(original: Exchange, output: Tensor, *args: Any, **kwargs: Any) -> Any:
            output.copy_(next(remaining))
            return _Done() if kwargs.get("async_op") else None

        with _instead(exchange):
            yield
        if next(remaining, None) is not None:
            raise RuntimeError("the step had fewer exchanges than the recorded one")


class _Done:
    def wait(self, timeout: timedelta | None = None) -> bool:
        return True


@dataclass
class Watched:
    """Times of one step on one rank, in seconds of ``time.perf_counter``, which on Linux is one
    clock for all processes of a machine.

    exchanges: from the start to the arrival of all rows, with the bytes sent. waits: in which the
    program stood still for one.
    """

    start: float = 0.0
    end: float = 0.0
    exchanges: list[tuple[float, float, int]] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)


def watch(step: Callable[[], Any]) -> Watched:
    """Run ``step`` and note when its exchanges were under way."""
    seen = Watched()

    def exchange(
        original: Exchange, output: Tensor, rows: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        start = time.perf_counter()
        work = original(output, rows, *args, **kwargs)
        if work is None:
            end = time.perf_counter()
            seen.exchanges.append((start, end, rows.nbytes))
            seen.waits.append((start, end))
            return None

        def arrived(_: Any) -> None:
            seen.exchanges.append((start, time.perf_counter(), rows.nbytes))

        work.get_future().add_done_callback(arrived)
        return _Waited(work, seen.waits)

    with _instead(exchange):
        seen.start = time.perf_counter()
        step()
        seen.end = time.perf_counter()
    _settle(seen)
    return seen


@dataclass
class _Waited:
    work: Any
    waits: list[tuple[float, float]]

    def wait(self, timeout: timedelta | None = None) -> Any:
        start = time.perf_counter()
        result = self.work.wait() if timeout is None else self.work.wait(timeout)
        self.waits.append((start, time.perf_counter()))
        return result


def _settle(seen: Watched) -> None:
    """An arrival is noted by another thread, maybe a moment after the wait for it has ended."""
    deadline = time.monotonic() + 1.0
    while len(seen.exchanges) < len(seen.waits) and time.monotonic() < deadline:
        time.sleep(0.001)
    seen.exchanges.sort()


@contextmanager
def _instead(exchange: Exchange) -> Iterator[None]:
    """``exchange(original, *args, **kwargs)`` in place of the function."""
    original = dist.all_to_all_single

    def stands_in(*args: Any, **kwargs: Any) -> Any:
        return exchange(original, *args, **kwargs)

    dist.all_to_all_single = stands_in
    try:
        yield
    finally:
        dist.all_to_all_single = original
