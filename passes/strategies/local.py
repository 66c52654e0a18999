"""Strategies "local" and "gather_weights": every expert is here, and no row travels.

Pseudo-code::

    counts = expert_counts(ids);  rows, row_map = permute(tokens, ids)
    out = combine(experts(rows), row_map)
"""

from __future__ import annotations

import torch
from torch.fx import Node

from moe_fx.passes.strategies.combine import combine
from moe_fx.passes.strategies.emitter import Emitter, weighed

aten = torch.ops.aten
ops = torch.ops.moe_fx


def local(emitter: Emitter) -> Node:
    parts = emitter.parts
    counts = emitter.call(ops.expert_counts.default, parts.ids, emitter.plan.num_experts)
    rows, row_map = permuted(emitter)
    return combine(emitter, [emitter.experts(rows, counts)], row_map)


def permuted(emitter: Emitter) -> tuple[Node, Node]:
    """Rows of the pairs, sorted by expert, and where each comes from."""
    parts = emitter.parts
    permuted = emitter.call(ops.permute.default, parts.tokens, parts.ids)
    rows, row_map = emitter.item(permuted, 0), emitter.item(permuted, 1)
    if parts.weighs_tokens:
        columns = [emitter.call(aten.reshape.default, n, [-1, 1]) for n in pairs(emitter)]
        factor = emitter.item(emitter.call(ops.permute.default, *columns), 0)
        rows = weighed(emitter, rows, factor)
    return rows, row_map


def pairs(emitter: Emitter) -> tuple[Node, Node]:
    """Weights and ids of the pairs, ``[T, K]`` each, where the weights multiply the tokens."""
    assert emitter.parts.weights is not None
    return emitter.parts.weights, emitter.parts.ids
