"""A model of two layers: prefill, and steps of decoding with a static cache.

A step begins with the same ``context`` tokens in the cache each time, so that it can be repeated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moe_fx.bench.layers import Layer, build_model
from moe_fx.bench.machine import Function, Machine
from moe_fx.bench.points import AGAINST, HF, MEASURING, Point
from moe_fx.bench.programs import Programs, attempt, compiled, note_plan
from moe_fx.bench.reference import relative_error
from moe_fx.bench.selection import Selection

__all__ = ["MOST_APART", "ModelRuns", "decoding"]

_Run = tuple[Callable[[Function], Tensor], Callable[[], None]]
"""What calls a function, and what puts back the state that this changes."""
MOST_APART = 0.5
"""Logits further from HF's than this are not explained by tokens that select another expert where
two are equal but for rounding."""


class ModelRuns:
    """Of one model: prefill, then decode at each batch."""

    def __init__(
        self, layer: Layer, selection: Selection, machine: Machine, say: Callable[[str], None]
    ) -> None:
        self.layer, self.selection, self.machine, self.say = layer, selection, machine, say
        self.model = build_model(layer, machine.device)
        self.vocabulary = self.model.config.get_text_config().vocab_size

    def points(self) -> Iterator[Point]:
        name = f"{self.layer.name}, two-layer model"
        yield self._point(Point(name, "prefill", self.selection.prefill), self._prefill)
        for batch in self.selection.batches:
            yield self._point(Point(name, "decode", batch), self._decode)

    def _point(self, point: Point, prepare: Callable[[int], _Run]) -> Point:
        self.say(f"{point.title}: compiling")
        with attempt(point, MEASURING), torch.no_grad():
            run, restore = prepare(point.tokens)
            functions, reports = compiled(self.model, False, self.selection.base)
            programs = Programs(
                point, self.machine, {n: _bound(run, f) for n, f in functions.items()}
            )
            programs.capture()
            found = programs.results(restore)
            for name, result in found.items():
                if HF in found:
                    point.errors[name] = relative_error(result, found[HF])
                else:
                    point.errors[name] = 0.0 if bool(result.isfinite().all()) else float("inf")
            for name in AGAINST:
                if name in found and not point.errors[name] <= MOST_APART:
                    point.failed[name] = f"wrong: logits {point.errors[name]:.1e} from HF's"
            note_plan(point, reports)
            self.say(f"{point.title}: timing")
            programs.time(self.selection.seconds_per_point, cold=False)
            if self.selection.parts:
                programs.profile()
        self.machine.clear()
        return point

    def _prefill(self, tokens: int) -> _Run:
        ids = self._ids(1, tokens)

        def run(function: Function) -> Tensor:
            logits: Tensor = function(input_ids=ids, use_cache=False).logits
            return logits

        return run, lambda: None

    def _decode(self, batch: int) -> _Run:
        selection = self.selection
        _, run, restore = decoding(
            self.model, batch, selection.context, selection.cache, self.machine.device
        )
        return run, restore

    def _ids(self, batch: int, length: int) -> Tensor:
        return torch.randint(self.vocabulary, (batch, length), device=self.machine.device)


def decoding(
    model: Any, batch: int, context: int, cache_size: int, device: torch.device
) -> tuple[Tensor, Callable[[Function], Tensor], Callable[[], None]]:
    """The last tokens' ids, a step of decode behind ``context`` tokens, and what puts back the
    cache. A full sliding window forgets its first token in every step, so what windows hold is put
    back where results are compared."""
    from transformers import StaticCache

    vocabulary = model.config.get_text_config().vocab_size
    cache: Any = StaticCache(config=model.config, max_cache_len=cache_size)
    named = inspect.signature(type(model).forward).parameters
    given: dict[str, Any] = {
        "cache" if "cache" in named else "past_key_values": cache,
        "use_cache": True,
    }
    model(input_ids=torch.randint(vocabulary, (batch, context), device=device), **given)
    lengths = [_lengths(layer) for layer in cache.layers]
    held = [(t, t.clone()) for layer in cache.layers for t in (layer.keys, layer.values)]
    ids = torch.randint(vocabulary, (batch, 1), device=device)

    def run(function: Function) -> Tensor:
        for layer, (counted, known) in zip(cache.layers, lengths, strict=True):
            layer.cumulative_length.fill_(counted)
            if known is not None:
                layer.cumulative_length_int = known
        logits: Tensor = function(input_ids=ids, **given).logits
        return logits

    def restore() -> None:
        for tensor, before in held:
            tensor.copy_(before)

    return ids, run, restore


def _bound(run: Callable[[Function], Tensor], function: Function) -> Callable[[], Tensor]:
    return lambda: run(function)


def _lengths(layer: Any) -> tuple[int, int | None]:
    """Tokens in a layer's cache: as a tensor knows it, and, of sliding windows, as Python does."""
    return int(layer.cumulative_length), getattr(layer, "cumulative_length_int", None)
