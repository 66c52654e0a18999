"""Combine: the experts' rows, back at their tokens' side, become the region's result.

Where all that the captured graph does there is to weigh rows, put them in token order and sum, one
``unpermute`` does it. Otherwise the rows are put in pair order and the captured ops follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from moe_fx.passes.emitter import Emitter
from moe_fx.passes.roles import VIEWS, PairWeights, argument, shape, value
from moe_fx.region import Parts

aten = torch.ops.aten
ops = torch.ops.moe_fx


def combine(emitter: Emitter, rows: list[Node], row_map: Node) -> Node:
    """``rows``: of all pairs, or in pieces that together are; ``row_map [T * K]``: where each
    pair's row is."""
    parts, call = emitter.parts, emitter.call
    summed = parts.combined.target is ops.unpermute.default
    weights = parts.combined.args[2] if summed else _plain_weights(emitter)
    num_tokens = call(aten.sym_size.int, parts.tokens, 0)
    if summed or weights is not None:
        sizes = [num_tokens, *shape(parts.combined)[1:]]
        return _unpermute(emitter, rows, row_map, weights, sizes)
    num_pairs = call(aten.sym_size.int, row_map, 0)
    sizes = [num_pairs, *shape(parts.cut)[1:]]
    values = {parts.cut: _unpermute(emitter, rows, row_map, None, sizes)}
    for node in parts.nodes:
        if not (isinstance(parts.roles[node], PairWeights) or node in parts.post):
            continue
        if emitter.is_permuting(node):
            source = node.args[0]
            assert isinstance(source, Node)
            values[node] = values[source]
        else:
            values[node] = emitter.copy(node, lambda n: values.get(n, n))
    return values[parts.combined]


def _unpermute(
    emitter: Emitter, rows: list[Node], row_map: Node, weights: Any, sizes: list[Any]
) -> Node:
    if len(rows) == 1:
        return emitter.call(ops.unpermute.default, rows[0], row_map, weights, sizes)
    return emitter.call(ops.unpermute_chunks.default, rows, row_map, weights, sizes)


def _plain_weights(emitter: Emitter) -> Node | None:
    """The weights if all that follows the cut is: times the weights, back to token order, sum;
    as a ``[T, K]`` node of the product's dtype."""
    parts = emitter.parts
    if parts.weights is None:
        return None
    muls = [n for n in parts.post if n.target is aten.mul.Tensor]
    others = [
        n
        for n in parts.post
        if n is not parts.combined
        and n not in muls
        and not emitter.is_permuting(n)
        and n.target not in (*VIEWS, aten.unsqueeze.default)
    ]
    pair_weights = [n for n in others if isinstance(parts.roles[n], PairWeights)]
    if len(muls) != 1 or len(pair_weights) != len(others) or len(shape(parts.cut)) != 2:
        return None
    factors = [n for n in muls[0].all_input_nodes if _is_weights(parts, n)]
    if len(factors) != 1 or argument(parts.combined, 3, "dtype") is not None:
        return None
    if any(n.target is not aten._to_copy.default for n in pair_weights):
        return None
    dtype = value(factors[0]).dtype
    if dtype == value(parts.weights).dtype:
        return parts.weights
    return emitter.call(aten._to_copy.default, parts.weights, dtype=dtype)


def _is_weights(parts: Parts, node: Node) -> bool:
    return isinstance(parts.roles.get(node), PairWeights)
