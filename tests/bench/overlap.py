"""``moe-fx bench``: how much of the exchange is hidden, on a two-host network of limited rate.

Every variant of a point runs in turn, round by round and every other round backwards, so that what
disturbs the machine disturbs all alike. A step is timed on each rank from a barrier to its end; the
slower rank counts. Figures are medians over rounds.

Compute only is our program without overlap, whose exchanges send nothing: each copies what the same
exchange delivered before. Exchange only carries the same rows and does nothing else, in one to
eight pieces at once. Everything is compared with the original block before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from moe_fx.errors import MoeFxError
from tests.bench import layers, ranks, timeline, variants
from tests.bench.hosts import HostError, Hosts
from tests.bench.netlab import Network, Unavailable
from tests.bench.results import AGREEMENT, Point, show, summarise, write_json

RATIOS = (0.25, 0.5, 1.0, 2.0)
ROUTINGS = ("uniform", "zipf")
RATE = 150.0
"""Mbit/s. The network's own work takes compute's cores the more, the higher the rate."""
_RATES = {0.25: 300.0}
"""Where another rate makes the ratio, and the experts need not be as wide."""
_PIECES = (1, 2, 4, 8)
_PROBE_WIDTHS = (512, 1536)
_PREPARE_TIMEOUT = 900.0
_STEP_TIMEOUT = 180.0

# What a run takes, on two cores.
_START_SECONDS, _PROBE_SECONDS = 30.0, 20.0
_COMPILE_SECONDS = 4.0
"""Of a program, checked, for each point: points of the same width share programs."""
_STEP_SECONDS, _TRAINING_STEP_SECONDS = 0.8, 1.5


@dataclass(frozen=True)
class Selection:
    """What to run: the grid is the product of the first four. backward: forward and backward, too
    or only. programs: of `variants.TITLES`."""

    layers: Sequence[str]
    ratios: Sequence[float]
    routings: Sequence[str]
    backward: Sequence[bool]
    rounds: int = 7
    trace: Path | None = None
    programs: Sequence[str] = tuple(variants.TITLES)

    @property
    def num_points(self) -> int:
        return len(self.layers) * len(self.ratios) * len(self.routings) * len(self.backward)

    @property
    def expected_seconds(self) -> float:
        """Rather too much than too little, from the runs in docs/overlap.md."""
        total = _START_SECONDS + _PROBE_SECONDS * len(self.layers)
        for backward in self.backward:
            a_point = len(self.programs) * _COMPILE_SECONDS
            steps = self.rounds * (len(self.programs) + len(_PIECES))
            a_point += steps * (_TRAINING_STEP_SECONDS if backward else _STEP_SECONDS)
            total += self.num_points / len(self.backward) * a_point
        return total


def select(
    names: Sequence[str] | None = None,
    ratios: Sequence[float] | None = None,
    routings: Sequence[str] | None = None,
    backward: bool | None = None,
    rounds: int | None = None,
    quick: bool = False,
    trace: Path | None = None,
    programs: Sequence[str] | None = None,
) -> Selection:
    """What the command's options mean: what is not given is one point if ``quick``, else all."""
    for ratio in ratios or ():
        if not 0.1 <= ratio <= 4:
            raise MoeFxError(f"--ratio {ratio:g}: give ratios of exchange to compute in 0.1 to 4")
    _require_known("--layer", names, tuple(layers.LAYERS))
    _require_known("--routing", routings, ROUTINGS)
    _require_known("--program", programs, tuple(variants.TITLES))
    wanted = {variants.COMPUTE, variants.UNOVERLAPPED, *(programs or variants.TITLES)}
    if backward is None:
        passes: tuple[bool, ...] = (False,) if quick else (False, True)
    else:
        passes = (backward,)
    return Selection(
        names or (("qwen3",) if quick else tuple(layers.LAYERS)),
        ratios or ((1.0,) if quick else RATIOS),
        routings or (("uniform",) if quick else ROUTINGS),
        passes,
        rounds or (3 if quick else 7),
        trace,
        tuple(name for name in variants.TITLES if name in wanted),
    )


def _require_known(option: str, given: Sequence[str] | None, known: Sequence[str]) -> None:
    for name in given or ():
        if name not in known:
            raise MoeFxError(f"{option} {name}: give {', '.join(known)}")


def failures(points: Sequence[Point]) -> list[str]:
    """Programs of ours that failed or differ."""
    names = (variants.COMPUTE, variants.UNOVERLAPPED, *variants.OURS)
    return [
        f"{point.title}: {name}: {point.failed[name]}"
        for point in points
        for name in names
        if name in point.failed
    ]


def run(selection: Selection, console: Console, json: Path | None = None) -> list[Point] | None:
    """Say how long it will take, measure, print, write. None if this machine cannot have the
    network: a message says why."""
    try:
        with Network(hosts=2, rate=RATE) as network:
            console.print(announcement(selection), highlight=False)
            with Hosts(network) as hosts, _Bench(network, hosts, selection, console) as bench:
                points = bench.run(json)
    except Unavailable as reason:
        console.print(f"[yellow]skipped:[/] {escape(str(reason))}")
        return None
    if len(points) > 1:
        summarise(points, console)
    return points


def announcement(selection: Selection) -> str:
    points, programs = selection.num_points, len(selection.programs)
    return (
        f"{points} point{'s' * (points > 1)}, {programs} programs, {selection.rounds} "
        f"round{'s' * (selection.rounds > 1)}: about {_duration(selection.expected_seconds)}; on a "
        "busy machine, twice that."
    )


def _duration(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    if minutes < 90:
        return f"{minutes} minute{'s' * (minutes > 1)}"
    return f"{seconds / 3600:.1f} hours"


class _Bench:
    def __init__(
        self, network: Network, hosts: Hosts, selection: Selection, console: Console
    ) -> None:
        self.network, self.hosts, self.selection, self.console = network, hosts, selection, console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.points: list[Point] = []
        self.traced = False

    def __enter__(self) -> _Bench:
        self.progress.start()
        self.all_points = self.progress.add_task("points", total=self.selection.num_points)
        self.now = self.progress.add_task("starting a rank on each host", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def run(self, json: Path | None) -> list[Point]:
        for name in self.selection.layers:
            widths = self.choose_widths(name)
            for backward in self.selection.backward:
                for width in dict.fromkeys(widths.values()):
                    ratios = [ratio for ratio, its in widths.items() if its == width]
                    self.measure_width(name, width, backward, ratios)
                    if json is not None:
                        write_json(self.points, json)
        return self.points

    def say(self, text: str, total: int | None = None) -> None:
        self.progress.update(self.now, description=text, total=total, completed=0)

    def choose_widths(self, name: str) -> dict[float, int]:
        """The width at each ratio, from compute at two widths and the exchange, all measured."""
        self.say(f"{name}: measuring compute and exchange, to set the width of an expert")
        narrow, wide = _PROBE_WIDTHS
        compute = {
            width: max(self.hosts.run(ranks.eager_seconds, name, width)) for width in (narrow, wide)
        }
        per_width = (compute[wide] - compute[narrow]) / (wide - narrow)
        self.network.set_rate(RATE)
        self.hosts.run(ranks.load, name, narrow, False)
        self.hosts.run(ranks.route, "uniform")
        times = [self.exchange(8) for _ in range(3)]
        fixed = compute[narrow] - narrow * per_width
        return {
            ratio: layers.width_for(
                sorted(times)[1], fixed, per_width, ratio * rate_of(ratio) / RATE
            )
            for ratio in self.selection.ratios
        }

    def exchange(self, pieces: int) -> float:
        return max(self.hosts.run(ranks.exchange_seconds, pieces, timeout=_STEP_TIMEOUT))

    def measure_width(self, name: str, width: int, backward: bool, ratios: Sequence[float]) -> None:
        """All points that share compiled programs. A variant that leaves the ranks out of step ends
        them; the others then start anew, without it."""
        lost: dict[str, str] = {}
        done: set[tuple[str, float]] = set()
        while True:
            try:
                self.hosts.run(ranks.load, name, width, backward)
                for routing in self.selection.routings:
                    left = [ratio for ratio in ratios if (routing, ratio) not in done]
                    for point in self.measure_routing(name, width, backward, routing, left, lost):
                        done.add((routing, point.ratio))
                        self.finish(point)
                return
            except _Lost as lost_variant:
                lost[lost_variant.name] = lost_variant.reason

    def measure_routing(
        self,
        name: str,
        width: int,
        backward: bool,
        routing: str,
        ratios: Sequence[float],
        lost: dict[str, str],
    ) -> Iterator[Point]:
        if not ratios:
            return
        self.say(f"{name}, width {width}: the original block, {routing} routing")
        shares = self.hosts.run(ranks.route, routing)[0]
        template = Point(name, routing, backward, ratios[0], RATE, width, shares=shares)
        template.failed.update(lost)
        self.prepare(template)
        for ratio in ratios:
            point = Point(name, routing, backward, ratio, rate_of(ratio), width, shares=shares)
            point.failed.update(template.failed)
            point.errors.update(template.errors)
            point.predicted.update(template.predicted)
            point.chosen.update(template.chosen)
            point.compile_seconds.update(template.compile_seconds)
            self.network.set_rate(point.rate)
            self.time(point)
            yield point

    def prepare(self, point: Point) -> None:
        names = [name for name in self.selection.programs if name not in point.failed]
        for index, name in enumerate(names):
            self.say(f"{point.layer}: compiling and checking {variants.TITLES[name]}", len(names))
            self.progress.update(self.now, completed=index)
            with self.attempt(point, name):
                found = self.hosts.run(ranks.prepare, name, timeout=_PREPARE_TIMEOUT)
                refused = next((one.refused for one in found if one.refused), "")
                if refused:
                    point.failed[name] = refused
                    continue
                point.errors[name] = max(one.error for one in found)
                point.compile_seconds[name] = max(one.seconds for one in found)
                point.predicted.update(found[0].predicted)
                if found[0].chosen:
                    point.chosen[name] = found[0].chosen
                if not point.errors[name] <= AGREEMENT:
                    point.failed[name] = (
                        f"differs from the original block by {point.errors[name]:.0e}, relative"
                    )

    def time(self, point: Point) -> None:
        steps: dict[str, Callable[[], float]] = {
            f"exchange{pieces}": partial(self.exchange, pieces) for pieces in _PIECES
        }
        for name in self.selection.programs:
            if name not in point.failed:
                steps[name] = partial(self.step, name)
        self.say(f"timing {point.title}", self.selection.rounds * len(steps))
        for number in range(self.selection.rounds):
            for name, step in list(steps.items())[:: -1 if number % 2 else 1]:
                if name not in point.failed:
                    with self.attempt(point, name):
                        point.samples.setdefault(name, []).append(step())
                self.progress.advance(self.now)

    def step(self, name: str) -> float:
        return max(self.hosts.run(ranks.step_seconds, name, timeout=_STEP_TIMEOUT))

    @contextmanager
    def attempt(self, point: Point, name: str) -> Iterator[None]:
        """A variant that fails is left out, with the reason; one that cost the ranks is `_Lost`."""
        try:
            yield
        except HostError as error:
            if not error.alive:
                raise _Lost(name, str(error)) from error
            point.failed[name] = str(error)
            point.samples.pop(name, None)

    def finish(self, point: Point) -> None:
        self.points.append(point)
        show(point, self.console)
        self.progress.advance(self.all_points)
        if self.selection.trace is not None and not self.traced:
            self.traced = True
            self.trace(point, self.selection.trace)

    def trace(self, point: Point, path: Path) -> None:
        """Of the first point: ours without overlap, and ours with."""
        self.say("one more step of each, with its times noted")
        names = [variants.UNOVERLAPPED, *([point.ours] if point.ours else [])]
        runs: list[timeline.Run] = []
        for name in names:
            with self.attempt(point, name):
                seen: list[Any] = self.hosts.run(ranks.watched_step, name, timeout=_STEP_TIMEOUT)
                runs.append(timeline.Run(variants.TITLES[name], seen))
        timeline.write_trace(runs, path)
        timeline.write_svg(runs, path.with_suffix(".svg"), point.title)
        where = f"trace: {path}, picture: {path.with_suffix('.svg')}"
        self.console.print(where, markup=False)


class _Lost(Exception):
    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason


def rate_of(ratio: float) -> float:
    """Mbit/s of the link at that ratio of exchange to compute."""
    return _RATES.get(ratio, RATE)


if __name__ == "__main__":
    import sys

    from moe_fx_cli import app

    app(["bench", *sys.argv[1:]])
