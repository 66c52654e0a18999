"""Lanes of compute, exchange and wait of each rank: a trace for Perfetto, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from tests.bench.exchanges import Watched

Interval = tuple[float, float]
_TEMPLATE = "timeline.svg.jinja"
_LANES = ("compute", "wait", "exchange")
_WIDTH, _LEFT, _ROW, _GAP, _TOP = 860.0, 130.0, 16.0, 4.0, 56.0


@dataclass(frozen=True)
class Run:
    """One step of one program, as every rank saw it."""

    title: str
    ranks: Sequence[Watched]


@dataclass(frozen=True)
class Span:
    """A piece of a lane. Seconds since the first rank started the step; slot: of an exchange, which
    of those in flight at once it is."""

    lane: str
    start: float
    end: float
    label: str = ""
    slot: int = 0


def spans(watched: Watched, origin: float) -> list[Span]:
    """A rank has one thread: what is not a wait is compute."""
    found = [Span("wait", *_since(interval, origin)) for interval in watched.waits]
    found += [
        Span("compute", *_since(interval, origin))
        for interval in complement(watched.waits, (watched.start, watched.end))
    ]
    busy: list[float] = []
    for start, end, size in watched.exchanges:
        slot = next((i for i, until in enumerate(busy) if until <= start), len(busy))
        busy[slot : slot + 1] = [end]
        interval = _since((start, end), origin)
        found.append(Span("exchange", *interval, f"{size / 2**20:.2f} MiB", slot))
    return found


def complement(intervals: Sequence[Interval], whole: Interval) -> list[Interval]:
    """The parts of ``whole`` outside all ``intervals``, in order."""
    found, position = [], whole[0]
    for start, end in sorted(intervals):
        if start > position:
            found.append((position, min(start, whole[1])))
        position = max(position, end)
    if position < whole[1]:
        found.append((position, whole[1]))
    return found


def _since(interval: Interval, origin: float) -> Interval:
    return interval[0] - origin, interval[1] - origin


def _origin(run: Run) -> float:
    return min(rank.start for rank in run.ranks)


def write_trace(runs: Sequence[Run], path: Path) -> None:
    """Trace Event Format, times in µs: opens in ui.perfetto.dev and chrome://tracing. A process is
    a rank in one run; a thread is a lane, and each exchange in flight at once has its own."""
    events: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        for rank, watched in enumerate(run.ranks):
            pid = number * len(run.ranks) + rank
            name = {"name": f"{run.title}: rank {rank}"}
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": name})
            threads: dict[int, str] = {}
            for span in spans(watched, _origin(run)):
                tid = _LANES.index(span.lane) + span.slot
                threads[tid] = span.lane + (f" {span.slot + 1}" if span.lane == "exchange" else "")
                events.append(
                    {
                        "ph": "X",
                        "name": span.lane,
                        "cat": span.lane,
                        "pid": pid,
                        "tid": tid,
                        "ts": 1e6 * span.start,
                        "dur": 1e6 * (span.end - span.start),
                        "args": {"rows": span.label} if span.label else {},
                    }
                )
            events += [
                {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": lane}}
                for tid, lane in sorted(threads.items())
            ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


@dataclass(frozen=True)
class Box:
    """A rectangle, in the picture's units."""

    lane: str
    x: float
    y: float
    width: float
    height: float
    tip: str


@dataclass(frozen=True)
class Text:
    kind: str
    x: float
    y: float
    text: str


def write_svg(runs: Sequence[Run], path: Path, title: str) -> None:
    """The lanes of the runs one below the other, on one scale of time."""
    longest = max((rank.end - _origin(run) for run in runs for rank in run.ranks), default=1e-3)
    scale = (_WIDTH - _LEFT - 30) / longest
    boxes: list[Box] = []
    texts: list[Text] = []
    y = _TOP
    for run in runs:
        took = max(rank.end for rank in run.ranks) - _origin(run)
        texts.append(Text("run", 14, y + 12, f"{run.title}: {1e3 * took:.0f} ms"))
        y += 24
        for rank, watched in enumerate(run.ranks):
            found = spans(watched, _origin(run))
            for lane in ("compute", "exchange"):
                height = _ROW * (1.4 if lane == "compute" else 1.0)
                label = f"rank {rank} {lane}"
                texts.append(Text("lane", _LEFT - 10, y + height / 2, label))
                boxes += _boxes(found, lane, y, height, scale)
                y += height + _GAP
            y += _GAP
        y += 14
    ticks = [Text("tick", _LEFT + scale * at, y, f"{1e3 * at:.0f}") for at in _ticks(longest)]
    folder = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True)
    path.write_text(
        environment.get_template(_TEMPLATE).render(
            title=title, boxes=boxes, texts=texts, ticks=ticks, top=_TOP, width=_WIDTH, bottom=y
        )
    )


def _boxes(found: list[Span], lane: str, y: float, height: float, scale: float) -> list[Box]:
    """Waits are drawn where compute stands still; exchanges in flight at once share the height."""
    drawn = [span for span in found if (span.lane == "exchange") == (lane == "exchange")]
    slots = 1 + max((span.slot for span in drawn), default=0)
    share = height / slots
    return [
        Box(
            span.lane,
            round(_LEFT + scale * span.start, 2),
            round(y + span.slot * share, 2),
            round(max(scale * (span.end - span.start), 0.4), 2),
            round(share - (0.5 if slots > 1 else 0), 2),
            f"{span.lane} {1e3 * (span.end - span.start):.1f} ms {span.label}".rstrip(),
        )
        for span in drawn
    ]


def _ticks(longest: float) -> list[float]:
    """At most eleven round times from 0."""
    step = 1e-3
    for factor in (2, 2.5, 2) * 5:
        if longest / step <= 10:
            break
        step *= factor
    return [step * i for i in range(int(longest / step) + 1)]
