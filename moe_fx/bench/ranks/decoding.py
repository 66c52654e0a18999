"""A step of decode of a two-layer model with a static cache, on every rank a batch of its own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_fx.bench.layers import Layer, build_model
from moe_fx.bench.machine import Machine
from moe_fx.bench.model_runs import decoding
from moe_fx.bench.ranks.points import RankPoint
from moe_fx.bench.ranks.programs import Function
from moe_fx.bench.reference import relative_error
from moe_fx.bench.selection import CACHE, CONTEXT

__all__ = ["Decoding"]


@dataclass
class Decoding:
    """Of this rank. run: a step with what stands in for the model. restore: puts back what steps
    change in windows that are full, before a result that is compared. ids: the last tokens, static.
    expected: logits of the model on one GPU."""

    run: Callable[[Any], Tensor]
    restore: Callable[[], None]
    ids: Tensor
    vocabulary: int
    expected: list[Tensor]
    top_k = 0  # of an exchange alone, which a model has not

    @classmethod
    def of(cls, layer: Layer, point: RankPoint, machine: Machine) -> Decoding:
        model = _model(layer, machine)
        vocabulary = model.config.get_text_config().vocab_size
        torch.manual_seed(1 + dist.get_rank())
        with torch.no_grad():
            ids, run, restore = decoding(model, point.tokens, CONTEXT, CACHE, machine.device)
            return cls(run, restore, ids, vocabulary, [run(model).clone()])

    def module(self, layer: Layer, machine: Machine) -> nn.Module:
        model: nn.Module = _model(layer, machine)
        return model

    @contextmanager
    def others(self) -> Iterator[None]:
        """Within, the tokens are others."""
        kept = self.ids.clone()
        self.ids.random_(self.vocabulary)
        try:
            yield
        finally:
            self.ids.copy_(kept)

    def results(self, run: Function, trained: nn.Module | None) -> list[Tensor]:
        with torch.no_grad():
            return [self.run(run)]

    def error(self, found: Sequence[Tensor]) -> float:
        return max(map(relative_error, found, self.expected))


def _model(layer: Layer, machine: Machine) -> Any:
    gc.collect()
    machine.clear()
    torch.manual_seed(0)
    return build_model(layer, machine.device)
