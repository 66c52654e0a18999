"""Figures of the overlap benchmark: what was measured at a point of the grid, and what follows."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.bench.variants import (
    AUTO,
    AUTO_EVEN,
    COMPUTE,
    FIXED,
    FIXED_EVEN,
    OURS,
    PEERS,
    TITLES,
    UNOVERLAPPED,
)

AGREEMENT = 1e-4
"""Largest difference from the original block, relative, at which a variant is timed."""


@dataclass
class Point:
    """One point of the grid. Times in seconds.

    ratio: exchange / compute as asked for. rate: Mbit/s. samples: of each variant, and of
    ``exchange1`` … by pieces in flight, one a round: the slower rank's. failed: why a variant was
    not timed. errors: difference from the original block, relative. shares: each expert's, of rank
    0's pairs. compile_seconds: of the first call, of each variant. predicted: by the cost model, of
    variants. chosen: what each automatic variant decided for, as the name of the fixed one.
    """

    layer: str
    routing: str
    backward: bool
    ratio: float
    rate: float
    width: int
    samples: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    compile_seconds: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)

    def seconds(self, name: str) -> float | None:
        """The median of the rounds."""
        values = self.samples.get(name)
        return statistics.median(values) if values else None

    @property
    def exchange(self) -> tuple[float, int] | None:
        """(seconds, pieces in flight): the best way to carry the rows and nothing else."""
        found = [
            (statistics.median(values), int(name.removeprefix("exchange")))
            for name, values in self.samples.items()
            if name.startswith("exchange") and values
        ]
        return min(found, default=None)

    @property
    def bound(self) -> float | None:
        """No program can be faster than the longer of compute and exchange."""
        compute = self.seconds(COMPUTE)
        return None if compute is None or self.exchange is None else max(compute, self.exchange[0])

    @property
    def measured_ratio(self) -> float | None:
        compute = self.seconds(COMPUTE)
        return None if not compute or self.exchange is None else self.exchange[0] / compute

    def over_bound(self, name: str) -> float | None:
        return _quotient(self.seconds(name), self.bound)

    def hidden(self, name: str) -> float | None:
        """The share of the time lost without overlap that the variant gets back: 1 at the bound, 0
        where it is as slow as ours without overlap."""
        off, own, bound = self.seconds(UNOVERLAPPED), self.seconds(name), self.bound
        if off is None or own is None or bound is None or off <= bound:
            return None
        return (off - own) / (off - bound)

    @property
    def ours(self) -> str | None:
        """The variant that a user gets: auto, or the best fixed one while there is no auto."""
        if self.seconds(AUTO) is not None:
            return AUTO
        found = [(seconds, name) for name in FIXED if (seconds := self.seconds(name)) is not None]
        return min(found)[1] if found else None

    def speedup(self, peer: str) -> float | None:
        """How many times as fast as ``peer`` ours is."""
        return _quotient(self.seconds(peer), self.seconds(self.ours) if self.ours else None)

    @property
    def from_best(self) -> float | None:
        """What auto decided for over the best of the other chunk counts and no overlap, less 1.

        Compared round by round, as the machine's speed drifts; the fixed program of the same plan
        counts as auto does (the mean of both)."""
        return self._from_best(AUTO, FIXED)

    @property
    def from_best_even(self) -> float | None:
        """The same where all ranks have the same number of tokens, over all strategies."""
        return self._from_best(AUTO_EVEN, (*FIXED, *FIXED_EVEN))

    def _from_best(self, auto: str, names: Sequence[str]) -> float | None:
        if any(name not in self.samples and name not in self.failed for name in names):
            return None  # not all were asked for
        same = [auto, self.chosen.get(auto, auto)]
        own = [self.samples[name] for name in same if self.samples.get(name)]
        others = [
            self.samples[name]
            for name in (UNOVERLAPPED, *names)
            if name not in same and self.samples.get(name)
        ]
        if not self.samples.get(auto) or not others:
            return None
        rounds = [statistics.mean(times) for times in zip(*own, strict=True)]
        return max(
            statistics.median(mine / its for mine, its in zip(rounds, other, strict=True)) - 1
            for other in others
        )

    @property
    def title(self) -> str:
        passes = "forward + backward" if self.backward else "forward"
        return f"{self.layer}, ratio {self.ratio:g}, {self.routing} routing, {passes}"

    def to_dict(self) -> dict[str, Any]:
        named = dict(vars(self))
        named["medians"] = {name: self.seconds(name) for name in self.samples}
        named["exchange"], named["exchange_pieces"] = self.exchange or (None, None)
        named["measured_ratio"], named["bound"] = self.measured_ratio, self.bound
        named["ours"], named["from_best"] = self.ours, self.from_best
        named["from_best_even"] = self.from_best_even
        timed = [name for name in TITLES if self.samples.get(name) and name != COMPUTE]
        named["over_bound"] = {name: self.over_bound(name) for name in timed}
        named["hidden"] = {name: self.hidden(name) for name in timed}
        named["speedup"] = {name: self.speedup(name) for name in (UNOVERLAPPED, *PEERS)}
        return named


def _quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def show(point: Point, console: Console) -> None:
    """The table of one point."""
    table = Table(title=point.title, caption=_caption(point), caption_justify="left")
    table.add_column("program", no_wrap=True)
    for heading in ("ms", "range", "predicted", "/ bound", "hidden", "ours faster", "error"):
        table.add_column(heading, justify="right")
    for name, title in TITLES.items():
        if name in point.failed:
            table.add_row(f"[dim]{title}", "[yellow]not timed")
        if name in point.failed or not point.samples.get(name):
            continue
        compared = name != COMPUTE
        table.add_row(
            f"[bold]{title}[/]" if name == point.ours else title,
            _ms(point.seconds(name)),
            _spread(point.samples[name]),
            _ms(point.predicted[name]) if name in point.predicted else "",
            _number(point.over_bound(name)) if compared else "",
            _percent(point.hidden(name)) if name in (*PEERS, *OURS) else "",
            _times(point.speedup(name)) if name in (UNOVERLAPPED, *PEERS) else "",
            f"{point.errors.get(name, 0.0):.0e}",
        )
    if point.exchange is not None:
        seconds, pieces = point.exchange
        one = point.seconds("exchange1")
        table.add_section()
        samples = point.samples[f"exchange{pieces}"]
        table.add_row(f"exchange only, {pieces} in flight", _ms(seconds), _spread(samples))
        if pieces != 1 and one is not None:
            table.add_row("exchange only, 1 in flight", _ms(one))
        table.add_row("bound: the longer of the two", _ms(point.bound))
    console.print(table)
    for reason, names in _reasons(point).items():
        console.print(
            f"[yellow]not timed:[/] {', '.join(names)}: {escape(reason)}", highlight=False
        )


def _reasons(point: Point) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in point.failed.items():
        found.setdefault(reason, []).append(TITLES.get(name, name))
    return found


def _caption(point: Point) -> str:
    measured = point.measured_ratio
    parts = [
        f"link {point.rate:g} Mbit/s, expert width {point.width}",
        f"exchange / compute measured {measured:.2f}" if measured else "",
        f"busiest expert {max(point.shares):.0%} of pairs" if point.shares else "",
        *(
            f"{TITLES[name]}: {TITLES.get(chosen, chosen).removeprefix('ours, ')}{_from(distance)}"
            for name, distance in ((AUTO, point.from_best), (AUTO_EVEN, point.from_best_even))
            if (chosen := point.chosen.get(name))
        ),
    ]
    return "; ".join(part for part in parts if part)


def _from(distance: float | None) -> str:
    return "" if distance is None else f" ({distance:+.1%} from the best other)"


def summarise(points: Sequence[Point], console: Console) -> None:
    """One line a point, times in ms."""
    table = Table(title="Overlap, all points (ms)")
    for heading in ("layer", "routing", "passes"):
        table.add_column(heading)
    for heading in (
        *("ratio", "compute", "exchange", "bound", "off", "ours", "/ bound", "hidden"),
        *("× HF", "× Inductor", "from best", "even", "/ bound", "from best"),
    ):
        table.add_column(heading, justify="right")
    for point in points:
        ours = point.ours
        hugging_face, inductor = (
            min(found, default=None) if (found := _speedups(point, names)) else None
            for names in (PEERS[:2], PEERS[2:])
        )
        table.add_row(
            *(point.layer, point.routing, "fwd+bwd" if point.backward else "fwd"),
            *(_number(point.measured_ratio), _ms(point.seconds(COMPUTE))),
            *(_ms(point.exchange and point.exchange[0]), _ms(point.bound)),
            *(_ms(point.seconds(UNOVERLAPPED)), _ms(point.seconds(ours) if ours else None)),
            _number(point.over_bound(ours) if ours else None),
            _percent(point.hidden(ours) if ours else None),
            *(_times(hugging_face), _times(inductor), _percent(point.from_best)),
            *(_ms(point.seconds(AUTO_EVEN)), _number(point.over_bound(AUTO_EVEN))),
            _percent(point.from_best_even),
        )
    console.print(table)


def _speedups(point: Point, names: Iterable[str]) -> list[float]:
    return [found for name in names if (found := point.speedup(name)) is not None]


def write_json(points: Sequence[Point], path: Path) -> None:
    """Everything that was measured, with what it was measured on."""
    machine = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hosts": 2,
        "threads_per_rank": 1,
    }
    found = {"machine": machine, "points": [point.to_dict() for point in points]}
    path.write_text(json.dumps(found, indent=2))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.0f}"


def _spread(values: Sequence[float]) -> str:
    return f"{1e3 * min(values):.0f}–{1e3 * max(values):.0f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} ×"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
