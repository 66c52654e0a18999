"""The table, and the JSON."""

from __future__ import annotations

import datetime
import importlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_fx.bench.floor import Rates
from moe_fx.bench.points import AGAINST, HF, HF_GRAPH, OURS, OURS_GRAPH, TITLES, Point
from moe_fx.errors import MoeFxError
from moe_fx.version import __version__

_HEADINGS = (
    *("floor", "HF", "moe_fx", "/ HF", "HF graph", "moe_fx graph", "/ HF", "/ floor"),
    *("error HF", "error moe_fx"),
)
_NAME = 60


def show(points: Sequence[Point], rates: Rates, name: str, console: Console) -> None:
    """All points in one table, µs; then why what is not there is not, and kernels if there are."""
    caption = f"bf16 product {rates.flops / 1e12:.0f} TFLOP/s, copy {rates.bytes / 1e9:.0f} GB/s"
    table = Table(title=f"{escape(name)}, µs", caption=caption, caption_justify="left")
    table.add_column("layer, tokens")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right")
    for point in points:
        errors = (_error(point, (HF, HF_GRAPH)), _error(point, (OURS, OURS_GRAPH)))
        table.add_row(
            escape(point.title),
            _micro(point.floor),
            *(_micro(point.seconds(HF)), _micro(point.seconds(OURS)), _ratio(point.ratio(OURS))),
            *(_micro(point.seconds(HF_GRAPH)), _micro(point.seconds(OURS_GRAPH))),
            _ratio(point.ratio(OURS_GRAPH)),
            _number(point.over_floor(OURS_GRAPH) or point.over_floor(OURS)),
            *errors,
        )
    console.print(table)
    for point in points:
        for program, reason in point.failed.items():
            said = f"{point.title}: {TITLES[program]}: {reason}"
            console.print(f"[red]{escape(said)}", highlight=False)
    for point in points:
        if point.parts:
            _show_parts(point, console)


def _show_parts(point: Point, console: Console) -> None:
    table = Table(title=f"moe_fx, {escape(point.title)}: kernels")
    table.add_column("kernel")
    table.add_column("launches", justify="right")
    table.add_column("µs", justify="right")
    for part in point.parts:
        name = part.name if len(part.name) <= _NAME else f"{part.name[: _NAME - 1]}…"
        table.add_row(escape(name), f"{part.launches:g}", _micro(part.seconds))
    console.print(table)


def one_line(point: Point) -> str:
    """Of a point that is done."""
    if point.seconds(HF) is None or point.seconds(OURS) is None:
        return f"{point.title}: {'; '.join(point.failed.values()) or 'not timed'}"
    pairs = [
        f"{label}{_micro(point.seconds(AGAINST[ours]))} HF, {_micro(point.seconds(ours))} moe_fx"
        for label, ours in (("", OURS), ("graph ", OURS_GRAPH))
        if point.ratio(ours) is not None
    ]
    return f"{point.title}: µs: {'; '.join(pairs)}"


def write_json(points: Sequence[Point], rates: Rates, name: str, path: Path) -> None:
    """Every figure, in seconds, with what it was measured on. `MoeFxError` if it cannot be
    written."""
    machine = {
        "name": name,
        "matmul_flops_per_second": rates.flops,
        "copy_bytes_per_second": rates.bytes,
    }
    write(path, machine, points)


class _Figures(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


def write(path: Path, machine: dict[str, Any], points: Sequence[_Figures]) -> None:
    """machine: what is known of it beside date and versions. `MoeFxError` if it cannot be
    written."""
    machine = machine | {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    found: dict[str, Any] = {"machine": machine, "points": [point.to_dict() for point in points]}
    try:
        path.write_text(json.dumps(found, indent=2, allow_nan=False))
    except OSError as error:
        raise MoeFxError(f"{path} cannot be written: {error.strerror}") from error


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"moe_fx": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = importlib.import_module(package).__version__
        except ImportError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    return found


def _error(point: Point, names: Sequence[str]) -> str:
    """The largest of the two ways to run it."""
    there = [point.errors[name] for name in names if name in point.errors]
    if not there:
        return "-"
    wrong = any(point.failed.get(name, "").startswith("wrong") for name in names)
    return f"[red]{max(there):.1e}" if wrong else f"{max(there):.1e}"


def _micro(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e6 * seconds:.0f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"[green]{value:.2f}" if value < 1 else f"{value:.2f}"
