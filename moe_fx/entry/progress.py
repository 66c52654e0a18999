"""A line for each graph that was compiled: on a terminal, of rank 0; otherwise in the log.

While the base compiler is at work the terminal shows what it works on, in a line that goes away.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from moe_fx.compat import compile_id
from moe_fx.options import Options
from moe_fx.plan import ExchangePlan
from moe_fx.report import Report

log = logging.getLogger("moe_fx")

_ERASE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))


class Progress:
    """Of one graph, whose compilation begins now."""

    def __init__(self, options: Options) -> None:
        self._base = options.base
        self._shows = options.progress and sys.stderr.isatty() and _rank() == 0
        self._begin = time.perf_counter()
        self._base_seconds = 0.0
        self._passing("looks for MoE layers")

    @contextmanager
    def base_compiles(self, report: Report) -> Iterator[None]:
        """Around the base compiler's work on the graph. report: of what was found in it."""
        self._passing(f"{found(report)}; {self._base} compiles it")
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._base_seconds += time.perf_counter() - begin

    def done(self, report: Report) -> None:
        seconds = time.perf_counter() - self._begin
        line = f"{_name()}{found(report)}; {seconds:.1f} s"
        if self._base_seconds:
            line += f", {self._base_seconds:.1f} s of it in {self._base}"
        if self._shows:
            self.clear()
            Console(stderr=True).print(Text(line), soft_wrap=True)
        else:
            log.info("%s", line)

    def clear(self) -> None:
        """Take away the line that says what is being done."""
        if self._shows:
            Console(stderr=True).control(_ERASE)  # nothing on a terminal that cannot do that

    def _passing(self, text: str) -> None:
        console = Console(stderr=True)
        if self._shows and not console.is_dumb_terminal:
            self.clear()
            now = Text(f"{_name()}{text} …")
            console.print(now, end="", no_wrap=True, overflow="ellipsis")


def found(report: Report) -> str:
    """``2 MoE layers, alltoall over 4 ranks in 2 chunks, 1 declined``."""
    if report.bugs:
        return "moe_fx failed (the log and the report say how), compiled as without it"
    parts = [_count(len(report.regions)) if report.regions else "no MoE layer"]
    ways = Counter(map(way, report.plans))
    parts += [f"{count} × {text}" if len(ways) > 1 else text for text, count in ways.items()]
    if report.missed:
        parts.append(f"{len(report.missed)} declined")
    return ", ".join(parts)


def way(plan: ExchangePlan) -> str:
    """How tokens and experts meet, in few words."""
    if plan.strategy == "local":
        return "on one rank"
    text = f"{plan.strategy} over {plan.world_size} ranks"
    return text + f" in {plan.chunks} chunks" if plan.chunks > 1 else text


def _count(layers: int) -> str:
    return "1 MoE layer" if layers == 1 else f"{layers} MoE layers"


def _name() -> str:
    """moe_fx, and the graph as torch's logs call it."""
    graph = compile_id()
    return f"moe_fx [{graph}]: " if graph else "moe_fx: "


def _rank() -> int:
    """Of this process, also before it has joined a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))
