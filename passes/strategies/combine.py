"""Combine: the experts' rows, back at their tokens' side, become the region's result.

Where all that the captured graph does there is to weigh rows, put them in token order and sum, one
``unpermute`` does it. Otherwise the rows are put in pair order and the captured ops follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from moe_fx.graph.nodes import VIEWS, argument, shape, value
from moe_fx.passes.roles import PairWeights
from moe_fx.passes.strategies.emitter import Emitter
from moe_fx.passes.strategies.narrow import is_permuting
from moe_fx.region import Parts

aten = torch.ops.aten
ops = torch.ops.moe_fx


def combine(emitter: Emitter, rows: list[Node], row_map: Node, missing: bool = False) -> Node:
    """``rows``: of all pairs, or in pieces that together are; ``row_map [T * K]``: where each
    pair's row is. missing: some may be nowhere."""
    parts, call = emitter.parts, emitter.call
    num_tokens = call(aten.sym_size.int, parts.tokens, 0)
    if sums_plainly(parts):
        sizes = [num_tokens, *shape(parts.combined)[1:]]
        return _unpermute(emitter, rows, row_map, weights_of_sum(emitter), sizes, missing)
    num_pairs = call(aten.sym_size.int, row_map, 0)
    sizes = [num_pairs, *shape(parts.cut)[1:]]
    values = {parts.cut: _unpermute(emitter, rows, row_map, None, sizes, missing)}
    for node in parts.nodes:
        if not (isinstance(parts.roles[node], PairWeights) or node in parts.post):
            continue
        if is_permuting(parts, node):
            source = node.args[0]
            assert isinstance(source, Node)
            values[node] = values[source]
        else:
            values[node] = emitter.copy(node, lambda n: values.get(n, n))
    return values[parts.combined]


def _unpermute(
    emitter: Emitter,
    rows: list[Node],
    row_map: Node,
    weights: Node | None,
    sizes: list[Any],
    missing: bool,
) -> Node:
    if missing:
        joined = emitter.call(aten.cat.default, rows) if len(rows) > 1 else rows[0]
        return emitter.call(ops.unpermute.default, joined, row_map, weights, sizes, True)
    if len(rows) == 1:
        return emitter.call(ops.unpermute.default, rows[0], row_map, weights, sizes)
    return emitter.call(ops.unpermute_chunks.default, rows, row_map, weights, sizes)


def sums_plainly(parts: Parts) -> bool:
    """Whether all that follows the cut is: times the weights if any, back to token order, sum."""
    return parts.combined.target is ops.unpermute.default or _factor(parts) is not None


def weights_of_sum(emitter: Emitter) -> Node | None:
    """The weights ``[T, K]`` of a plain sum, of the product's dtype."""
    parts = emitter.parts
    if parts.combined.target is ops.unpermute.default:
        weights: Any = parts.combined.args[2]
        return weights
    factor = _factor(parts)
    assert factor is not None and parts.weights is not None
    dtype = value(factor).dtype
    if dtype == value(parts.weights).dtype:
        return parts.weights
    return emitter.call(aten._to_copy.default, parts.weights, dtype=dtype)


def _factor(parts: Parts) -> Node | None:
    """What rows are multiplied with if that is the weights, at most cast."""
    if parts.weights is None:
        return None
    muls = [n for n in parts.post if n.target is aten.mul.Tensor]
    others = [
        n
        for n in parts.post
        if n is not parts.combined
        and n not in muls
        and not is_permuting(parts, n)
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
    return factors[0]


def _is_weights(parts: Parts, node: Node) -> bool:
    return isinstance(parts.roles.get(node), PairWeights)
