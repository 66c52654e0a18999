"""Two resources, simulated: what a pipeline of exchanges and compute takes.

The *compute thread* runs one thing at a time; the *link* carries exchanges in the order in which
they were queued::

    halves = Pipeline(before=0, dispatch=[8e6] * 2, work=[0.1] * 2, combine=[8e6] * 2, after=0)
    simulate(halves, link).seconds
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields

from moe_fx.cost.link import Link
from moe_fx.plan import Span


@dataclass(frozen=True)
class Prediction:
    """Seconds. compute: of the compute thread. exchange: of the link. exposed: of
    exchange behind which nothing was computed. ``seconds == compute + exposed``."""

    seconds: float
    compute: float
    exchange: float
    exposed: float

    def __add__(self, other: Prediction) -> Prediction:
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Prediction(*(a + b for a, b in pairs))


@dataclass(frozen=True)
class Pipeline:
    """Seconds of compute before, of each piece and after; bytes a rank sends to others, of each
    piece, on the way to the experts and back. filler: seconds of compute at any time.
    piece_fillers: of each piece, at any time once its work is done."""

    before: float
    dispatch: Sequence[float]
    work: Sequence[float]
    combine: Sequence[float]
    after: float
    filler: float = 0.0
    piece_fillers: Sequence[float] = ()


def simulate(pipeline: Pipeline, link: Link, spans: list[Span] | None = None) -> Prediction:
    """``spans``: what was done is appended."""
    wire = _Wire(link, [] if spans is None else spans)
    clock = _Clock(wire, pipeline.filler)
    clock.work(pipeline.before)
    clock.wait(wire.queue(0.0))  # the counts
    arrivals = [wire.queue(num_bytes) for num_bytes in pipeline.dispatch]
    returns = []
    fillers = pipeline.piece_fillers or [0.0] * len(arrivals)
    pieces = zip(arrivals, pipeline.work, pipeline.combine, fillers, strict=True)
    for arrival, work, num_bytes, filler in pieces:
        clock.wait(arrival)
        clock.work(work)
        returns.append(wire.queue(num_bytes))
        clock.filler += filler
    for number in returns:
        clock.wait(number)
    clock.work(clock.filler)
    clock.work(pipeline.after)
    return Prediction(clock.busy + clock.waited, clock.busy, wire.busy, clock.waited)


class _Wire:
    """The link: exchanges numbered and served in order, each its latency and then its bytes, which
    go at the rate for as many exchanges as are in flight at the time."""

    def __init__(self, link: Link, spans: list[Span]) -> None:
        self.link, self.spans = link, spans
        self.pending: deque[list[float]] = deque()  # [latency left, bytes left]
        self.queued = self.done = 0
        self.busy = self.now = self.began = 0.0

    def queue(self, num_bytes: float) -> int:
        """The number of the exchange."""
        if not self.pending:
            self.began = self.now
        self.pending.append([self.link.latency, num_bytes])
        self.queued += 1
        return self.queued

    def left(self) -> float:
        """Seconds until the exchange being served is done, if no other is queued."""
        latency, num_bytes = self.pending[0]
        return latency + num_bytes * self.link.rate(len(self.pending))

    def serve(self) -> float:
        """Finish the exchange being served; the seconds that takes."""
        seconds = self.left()
        self.pending.popleft()
        self.done += 1
        self.busy += seconds
        self.now += seconds
        self.spans.append(Span("exchange", self.began, self.now))
        self.began = self.now
        return seconds

    def run(self, seconds: float) -> None:
        """Carry on for so long."""
        while self.pending and self.left() <= seconds:
            seconds -= self.serve()
        self.now += seconds
        if self.pending and seconds > 0:
            self.busy += seconds
            front = self.pending[0]
            latency = min(front[0], seconds)
            front[0] -= latency
            if seconds > latency:
                front[1] -= (seconds - latency) / self.link.rate(len(self.pending))


class _Clock:
    """The compute thread."""

    def __init__(self, wire: _Wire, filler: float) -> None:
        self.wire, self.filler = wire, filler
        self.busy = self.waited = 0.0

    def work(self, seconds: float) -> None:
        start = self.wire.now
        self.busy += seconds
        self.wire.run(seconds)
        self._record("compute", start)

    def wait(self, number: int) -> None:
        while self.wire.done < number and self.filler > 0:
            seconds = min(self.filler, self.wire.left())
            self.filler -= seconds
            self.work(seconds)
        start = self.wire.now
        while self.wire.done < number:
            self.waited += self.wire.serve()
        self._record("wait", start)

    def _record(self, lane: str, start: float) -> None:
        if self.wire.now > start:
            self.wire.spans.append(Span(lane, start, self.wire.now))
