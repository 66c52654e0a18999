"""What the command is asked for, checked before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe_fx.bench.layers import LAYERS, MODELS, Layer, from_file
from moe_fx.errors import ConfigurationError

TOKENS = (16, 256, 2048, 16384)
TRAINING_TOKENS = (4096,)
PREFILL = 2048
BATCHES = (1, 16, 64)
CONTEXT, CACHE = 512, 1024
SECONDS = 4.0
_COMPILE_SECONDS = {"layer": 25.0, "model": 60.0}
"""What a point takes beside its timing, about: most of it is two compilations."""


@dataclass(frozen=True)
class Selection:
    """layers, models: what is measured. tokens: in one call of a layer. prefill: tokens; batches:
    of decode, with ``context`` tokens before in a cache of ``cache``. base: the compiler of both
    sides."""

    layers: Sequence[Layer] = ()
    models: Sequence[Layer] = ()
    tokens: Sequence[int] = TOKENS
    training: bool = False
    dynamic: bool = False
    parts: bool = False
    seconds_per_point: float = SECONDS
    prefill: int = PREFILL
    batches: Sequence[int] = BATCHES
    context: int = CONTEXT
    cache: int = CACHE
    base: str = field(default="inductor", repr=False)

    @property
    def num_points(self) -> int:
        return len(self.layers) * len(self.tokens) + len(self.models) * (1 + len(self.batches))

    @property
    def announcement(self) -> str:
        """How long it will take, about."""
        of_models = len(self.models) * (1 + len(self.batches))
        of_layers = self.num_points - of_models
        compiled = len(self.layers) if self.dynamic else of_layers
        compiling = compiled * _COMPILE_SECONDS["layer"] + of_models * _COMPILE_SECONDS["model"]
        timing = self.num_points * self.seconds_per_point
        points = f"{self.num_points} point{'s' * (self.num_points != 1)}"
        return (
            f"{points}: about {_minutes(timing + compiling)}, of which {_minutes(timing)} timing "
            "and the rest compiling. Keep the card otherwise idle."
        )


def select(
    layers: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    config: Path | None = None,
    tokens: Sequence[int] | None = None,
    training: bool = False,
    dynamic: bool = False,
    parts: bool = False,
    seconds_per_point: float | None = None,
) -> Selection:
    """What the command's options mean: without ``layers``, ``models`` and ``config`` all layers.
    Raises `ConfigurationError` for a name that is not known."""
    chosen = [_known("--layer", name, LAYERS) for name in layers or ()]
    whole = [_known("--model", name, MODELS) for name in models or ()]
    if config is not None:
        chosen.append(from_file(config))
    if not chosen and not whole:
        chosen = list(LAYERS.values())
    return Selection(
        chosen,
        whole,
        tokens or (TRAINING_TOKENS if training else TOKENS),
        training,
        dynamic,
        parts,
        seconds_per_point or SECONDS,
    )


def _known(option: str, name: str, table: dict[str, Layer]) -> Layer:
    found = table.get(name.replace("_", "-"))
    if found is None:
        raise ConfigurationError(f"{option} {name}: give {', '.join(table)}")
    return found


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{round(seconds)} seconds"
    return f"{seconds / 60:.0f} minutes"
