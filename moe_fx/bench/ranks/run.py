"""The command under torchrun: every rank measures, the first prints and writes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape

from moe_fx.bench.layers import LAYERS, MODELS, Layer, from_file
from moe_fx.bench.machine import Gpu, Machine
from moe_fx.bench.ranks.measure import measure
from moe_fx.bench.ranks.points import RankPoint, show
from moe_fx.bench.ranks.programs import EXCHANGE, PROGRAMS
from moe_fx.bench.results import write
from moe_fx.errors import ConfigurationError

__all__ = ["failures", "on_gpus", "run"]

_TOKENS = (64, 1024, 8192)
_BATCHES = (1, 16)
_ROUTINGS = ("uniform", "zipf")
_DEFAULT = ("qwen3", "mixtral")
_ROUNDS = 15
_COMPILED = 64
"""Programs of one block, all of them of the same code."""


def on_gpus(console: Console, path: Path | None, **selected: Any) -> list[RankPoint]:
    """`run` on this rank's GPU, over NCCL."""
    machine = Gpu(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=machine.device)
    try:
        return run(machine, console, path, **selected)
    finally:
        dist.destroy_process_group()


def run(
    machine: Machine,
    console: Console,
    path: Path | None = None,
    layers: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    config: Path | None = None,
    tokens: Sequence[int] | None = None,
    routing: Sequence[str] | None = None,
    programs: Sequence[str] | None = None,
    rounds: int | None = None,
    training: bool = False,
    base: str = "inductor",
    trace: Path | None = None,
) -> list[RankPoint]:
    """What is asked for, on all ranks of the default group, all of which call it alike. trace: gets
    one call of each program of the first point."""
    speaks = dist.get_rank() == 0
    aside = Console(stderr=True, quiet=not speaks)

    def say(text: str) -> None:
        aside.print(escape(text), highlight=False, style="dim", soft_wrap=True)

    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache")
    chosen = _layers(layers, config, models)
    names = _known("--program", programs or list(PROGRAMS), PROGRAMS)
    routings = _known("--routing", routing or ["uniform"], dict.fromkeys(_ROUTINGS, ""))
    name = f"{dist.get_world_size()} × {machine.name}"
    world = dist.get_world_size()
    selected = [
        (layer, RankPoint(layer.name, number, how, training, world))
        for layer in chosen
        for number in tokens or _TOKENS
        for how in routings
    ] + [
        (MODELS[each], RankPoint(each, number, "uniform", False, world, decodes=True))
        for each in _known("--model", models or (), MODELS)
        for number in tokens or _BATCHES
    ]
    say(f"{name}: {len(selected)} points, a minute each")
    points: list[RankPoint] = []
    for layer, point in selected:
        its = [each for each in names if not (point.decodes and each == EXCHANGE)]
        with torch._dynamo.config.patch(recompile_limit=_COMPILED):
            first = trace if not points else None
            measure(layer, point, its, machine, rounds or _ROUNDS, base, say, first)
        points.append(point)
        if speaks and path is not None:
            write(path, {"name": name, "threads": torch.get_num_threads()}, points)
    if speaks:
        show(points, name, console)
    return points


def failures(points: list[RankPoint]) -> list[str]:
    return [said for point in points for said in point.wrong]


def _layers(
    names: Sequence[str] | None, config: Path | None, models: Sequence[str] | None
) -> list[Layer]:
    found = [LAYERS[each] for each in _known("--layer", names or (), LAYERS)]
    if config is not None:
        found.append(from_file(config))
    return found or [LAYERS[each] for each in _DEFAULT if not models]


def _known(option: str, names: Sequence[str], table: dict[str, Any]) -> list[str]:
    for name in names:
        if name.replace("_", "-") not in table and name not in table:
            raise ConfigurationError(f"{option} {name}: give {', '.join(table)}")
    return [name if name in table else name.replace("_", "-") for name in names]
