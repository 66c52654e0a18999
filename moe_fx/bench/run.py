"""The command: say how long, measure every point, print the table, write the JSON."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from moe_fx.bench import floor
from moe_fx.bench.layer_runs import LayerRuns
from moe_fx.bench.machine import Gpu, Machine
from moe_fx.bench.model_runs import ModelRuns
from moe_fx.bench.points import MEASURING, Point
from moe_fx.bench.results import one_line, show, write_json
from moe_fx.bench.selection import Selection

__all__ = ["failures", "on_gpu", "run"]


def on_gpu(device: str, selection: Selection, console: Console, json: Path | None) -> list[Point]:
    """`run` on ``device``, ``"cuda"`` or ``"cuda:1"``. Raises `ConfigurationError` saying what to
    do if torch sees no such GPU."""
    return run(selection, Gpu(device), console, json)


def run(
    selection: Selection, machine: Machine, console: Console, json: Path | None = None
) -> list[Point]:
    """What is asked for, on ``machine``: the table on ``console``, progress on standard error. The
    JSON is written anew after every point, so that what is stopped is not lost."""
    aside = Console(stderr=True)

    def say(text: str) -> None:
        aside.print(escape(text), highlight=False, style="dim", soft_wrap=True)

    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache")
    say(f"{machine.name}: {selection.announcement}")
    torch.manual_seed(0)
    rates = floor.measured(machine)
    points: list[Point] = []
    for point in _points(selection, machine, rates, say):
        points.append(point)
        say(one_line(point))
        if json is not None:
            write_json(points, rates, machine.name, json)
    show(points, rates, machine.name, console)
    return points


def _points(
    selection: Selection, machine: Machine, rates: floor.Rates, say: Callable[[str], None]
) -> Iterator[Point]:
    for layer in selection.layers:
        say(f"{layer.name}: {layer.title}")
        try:
            runs = LayerRuns(layer, selection, machine, rates, say)
        except torch.OutOfMemoryError as error:
            yield _no_room(layer.name, "forward", selection.tokens[0], error)
            continue
        yield from runs.points(selection.tokens)
        del runs
        machine.clear()
    for layer in selection.models:
        say(f"{layer.name}, two-layer model: {layer.title}")
        try:
            model = ModelRuns(layer, selection, machine, say)
        except torch.OutOfMemoryError as error:
            yield _no_room(layer.name, "prefill", selection.prefill, error)
            continue
        yield from model.points()
        del model
        machine.clear()


def _no_room(name: str, kind: str, tokens: int, error: torch.OutOfMemoryError) -> Point:
    reason = f"the card has no room for it: {str(error).splitlines()[0]}"
    return Point(name, kind, tokens, failed={MEASURING: reason})


def failures(points: list[Point]) -> list[str]:
    """What failed of ours, or is wrong, for people."""
    return [said for point in points for said in point.wrong]
