"""What an extracted region is run on: values of its inputs on every rank, one input at a time.

Contract. ``RankValues.inputs(routing)`` gives the inputs by rank: tokens, ids, weights and all else
that varies with tokens are a rank's own; tables are the same on every rank, a shard its part. Each
input has values of its own, so that ``inputs(routing, changed=...)`` differs in those inputs alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.graph.nodes import shape, value
from moe_fx.passes.evaluate.extract import Extract
from moe_fx.passes.evaluate.sizes import TokenCount, choose_token_count, concrete, example
from moe_fx.passes.evaluate.typical import drawn, kind_of
from moe_fx.passes.evaluate.uses import reads_values
from moe_fx.passes.recognise.by_value.rows.layout import is_buffer
from moe_fx.passes.roles import PerToken
from moe_fx.plan import ExchangePlan
from moe_fx.region import Region

aten = torch.ops.aten

RANDOM, REPEATED, AT_CAPTURE = "random routing", "repeated experts", "the values at capture"
_OF_INPUT, _OF_RANK = 1009, 31  # steps of the seed


def kind_of_input(alone: Extract, region: Region, at: int) -> str:
    """What an input of the extracted ``region`` is called in a report (`moe_fx.region.Effect`)."""
    node, parts = alone.copies[alone.inputs[at]], region.parts
    if node is parts.tokens:
        return "tokens"
    if node is parts.ids:
        return "ids"
    return "weights" if node is parts.weights else kind_of(alone.inputs[at])


def name_of_input(alone: Extract, region: Region, at: int) -> str:
    kind = kind_of_input(alone, region, at)
    return kind if kind in ("tokens", "weights") else alone.inputs[at].name


@dataclass
class RankValues:
    """num_tokens: of a rank; fewer on some, unless the plan needs the same on all."""

    alone: Extract
    region: Region
    plan: ExchangePlan
    num_tokens: int

    def __post_init__(self) -> None:
        self._common: dict[tuple[int, int, bool], Any] = {}

    @cached_property
    def counts(self) -> list[TokenCount]:
        region, plan, most = self.region, self.plan, self.num_tokens
        captured = shape(region.parts.tokens)[0]
        return [
            choose_token_count(
                captured,
                region.top_k,
                region.num_experts,
                most if plan.even else max(1, most - rank % 3),
            )
            for rank in range(plan.world_size)
        ]

    @property
    def routings(self) -> list[str]:
        """Names of adversarial ids, such as the region's router can select: an expert comes up
        twice for a token only if the router may do that."""
        names = []
        if self.region.top_k <= self.region.num_experts:
            names += [RANDOM, "only the last experts", "only the first experts"]
        if not self.region.parts.distinct:
            names += [REPEATED, "all tokens to one expert"]
        if any("real" in node.meta or "scalar" in node.meta for node in self.alone.inputs):
            names.append(AT_CAPTURE)
        return names

    @cached_property
    def groups(self) -> list[tuple[int, ...]]:
        """Positions of the inputs whose values are read, each alone; matrices that are stacked to
        one table together. A buffer that the graph makes to write into is no input of the layer."""
        found: dict[Any, list[int]] = {}
        for at, original in enumerate(self.alone.inputs):
            node = self.alone.copies[original]
            readers = [user for user in node.users if reads_values(user)]
            made_inside = kind_of(original) in ("size", "constant") or is_buffer(original)
            if not readers or made_inside:
                continue
            stacked = len(readers) == 1 and readers[0].target is aten.stack.default
            found.setdefault(readers[0] if stacked else node, []).append(at)
        return [tuple(positions) for positions in found.values()]

    def inputs(
        self, routing: str, changed: Collection[int] = (), again: int = 1
    ) -> list[list[Any]]:
        """By rank. changed: positions of inputs that get the ``again``-th other values."""
        return [
            [
                self._value(at, rank, routing, again if at in changed else 0)
                for at in range(len(self.alone.inputs))
            ]
            for rank in range(self.plan.world_size)
        ]

    # -- one value -----------------------------------------------------------------------------

    def _value(self, at: int, rank: int, routing: str, again: int) -> Any:
        original, count = self.alone.inputs[at], self.counts[rank]
        node, parts = self.alone.copies[original], self.region.parts
        seed = _OF_INPUT * (at + 1)
        own = routing == AT_CAPTURE and not again
        if node is parts.ids:
            ids = self._ids(routing, count.wanted, seed + _OF_RANK * rank + again, again)
            return ids.contiguous().to(value(node).dtype)
        varies = isinstance(parts.roles.get(node), PerToken)
        if varies or node in (parts.tokens, parts.weights):
            seed += _OF_RANK * rank + len(routing)
            return example(original, count, seed, per_token=True, again=again, own=own)
        if not isinstance(value(original), Tensor):
            return example(original, count, seed, again=again, own=own)
        if (at, again, own) not in self._common:
            self._common[at, again, own] = self._whole(original, node, seed, again, own)
        whole = self._common[at, again, own]
        sharded = any(node is gather.shard for gather in parts.gathers)
        return whole[rank] if sharded else whole

    def _whole(self, original: Node, node: Node, seed: int, again: int, own: bool) -> Any:
        """What every rank has in common; of shards, the tuple of all ranks'."""
        sizes = [concrete(size) for size in shape(original)]
        if not any(node is gather.shard for gather in self.region.parts.gathers):
            return drawn(original, sizes, seed, again=again, own=own, weight=True)
        world = self.plan.world_size
        sizes[0] *= world
        return drawn(original, sizes, seed, again=again, weight=True).chunk(world)

    def _ids(self, routing: str, num_tokens: int, seed: int, again: int) -> Tensor:
        """``[T, K]``."""
        experts, k = self.region.num_experts, self.region.top_k
        generator = torch.Generator().manual_seed(seed)
        if again or routing == AT_CAPTURE:
            routing = RANDOM if k <= experts else REPEATED
        if routing == RANDOM:
            return torch.rand(num_tokens, experts, generator=generator).argsort(1)[:, :k]
        if routing == REPEATED:
            return torch.randint(experts, (num_tokens, k), generator=generator)
        if routing == "all tokens to one expert":
            return torch.full((num_tokens, k), experts - 1)
        order = torch.arange(experts)
        return (order if "first" in routing else order.flip(0))[:k].repeat(num_tokens, 1)
