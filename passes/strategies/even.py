"""How rows travel in equal parts: sizes follow from the number of tokens, so the host waits for
nothing (`moe_fx.ops.padded`). All ranks have the same number of tokens; ``even_sizes`` checks it.

Pseudo-code of "padded_alltoall" (``chunk``: a slice of the tokens)::

    rows of each chunk, row_map, counts = permute_padded(tokens, keys)
    recv = exchange_counts(counts);  sizes = even_sizes(rows)
    for each chunk, all started before the first is waited for:
        arrived = wait(all_to_all(rows));  rows, regroup_map = regroup_padded(arrived, recv)
        rows = unpermute(experts(rows), regroup_map);  rows = wait(all_to_all(rows))
    out = combine(rows, row_map), pairs without a slot adding nothing

of "allgather", an all-gather being an all-to-all of as many copies as there are ranks, and a
reduce-scatter one of partial results, summed where they arrive::

    ids, weights = those of all ranks
    for each chunk, all started before the first is waited for:
        arrived = tokens of all ranks
        rows, row_map = permute_local(arrived, ids);  rows = experts(rows)
        partial = unpermute(rows, row_map, weights)
        shares = wait(all_to_all(partial));  out = sum of the shares over their ranks, in float32
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from moe_fx.cost.layer import fill
from moe_fx.graph.nodes import shape, value
from moe_fx.passes.strategies.combine import combine, weights_of_sum
from moe_fx.passes.strategies.emitter import Emitter, weighed

aten = torch.ops.aten
ops = torch.ops.moe_fx

_COARSE = (torch.bfloat16, torch.float16)


def padded_alltoall(emitter: Emitter) -> Node:
    parts, plan, call, item = emitter.parts, emitter.plan, emitter.call, emitter.item
    local, chunks = plan.local_experts, plan.token_slices
    keys: Node = parts.ids
    if chunks > 1:
        keys = call(ops.chunk_keys.default, keys, plan.places, plan.world_size, 1, chunks)
    permuted = call(
        ops.permute_padded.default,
        sent_tokens(emitter),
        keys,
        local,
        plan.world_size,
        chunks,
        *_capacity(emitter),
    )
    rows, row_map, counts = (item(permuted, at) for at in range(3))
    pieces = [emitter.leaving(item(rows, at)) for at in range(chunks)]
    by_chunk = {"chunks": chunks} if chunks > 1 else {}
    received = call(ops.exchange_counts.default, counts, plan.group_name, **by_chunk)
    exchange = _Exchange(emitter, pieces)
    handles = [exchange.start(piece, at) for at, piece in enumerate(pieces)]
    done = []
    for at, piece in enumerate(pieces):
        arrived = exchange.wait(handles[at], piece, at)
        of_chunk = received
        if chunks > 1:
            of_chunk = call(aten.slice.Tensor, received, 1, at * local, (at + 1) * local)
        regrouped = call(ops.regroup_padded.default, arrived, of_chunk)
        sorted_rows, regroup_map = item(regrouped, 0), item(regrouped, 1)
        sums = call(aten.sum.dim_IntList, of_chunk, [0])
        result = emitter.experts(sorted_rows, sums, 0, filled_share(emitter))
        sizes = [call(aten.sym_size.int, result, 0), *shape(parts.cut)[1:]]
        done.append(call(ops.unpermute.default, result, regroup_map, None, sizes))
        handles[at] = exchange.start(done[at], at)
    back = [emitter.back(exchange.wait(handles[at], piece, at)) for at, piece in enumerate(done)]
    return combine(emitter, back, row_map, missing=True)


def allgather(emitter: Emitter) -> Node:
    parts, plan, call, item = emitter.parts, emitter.plan, emitter.call, emitter.item
    world, chunks = plan.world_size, plan.token_slices
    pieces = _slices(emitter, _copies(emitter, sent_tokens(emitter)))
    exchange = _Exchange(emitter, pieces)
    ids = call(aten._to_copy.default, parts.ids, dtype=torch.int32)
    weights = None if parts.weighs_tokens else weights_of_sum(emitter)
    small = [_copies(emitter, node) for node in (ids, weights) if node is not None]
    started = [exchange.start(node) for node in small]
    handles = [exchange.start(piece, at) for at, piece in enumerate(pieces)]
    every = [
        _slices(emitter, exchange.wait(handle, node))
        for handle, node in zip(started, small, strict=True)
    ]
    partial, counts = [], []
    for at, piece in enumerate(pieces):
        arrived = exchange.wait(handles[at], piece, at)
        permuted = call(
            ops.permute_local.default,
            arrived,
            every[0][at],
            plan.first_expert,
            plan.local_experts,
            world,
            *_capacity(emitter),
        )
        rows, row_map = item(permuted, 0), item(permuted, 1)
        result = emitter.experts(rows, item(permuted, 2), 0, filled_share(emitter))
        count = call(aten.sym_size.int, arrived, 0)
        sizes = [count, *shape(parts.combined)[1:]]
        weighed_by = None if weights is None else every[1][at]
        partial.append(call(ops.unpermute.default, result, row_map, weighed_by, sizes, True))
        counts.append(count)
        handles[at] = exchange.start(partial[at], at)
    results = []
    for at, piece in enumerate(partial):
        shares = exchange.wait(handles[at], piece, at)
        tokens = call(operator.floordiv, counts[at], world)
        sizes = [world, tokens, *shape(parts.combined)[1:]]
        results.append(_summed(emitter, call(aten.reshape.default, shares, sizes)))
    return results[0] if chunks == 1 else call(aten.cat.default, results)


class _Exchange:
    """Equal parts to and from every rank; ``at``: of that piece, None: of all pieces together."""

    def __init__(self, emitter: Emitter, pieces: list[Node]) -> None:
        self.emitter, self.call = emitter, emitter.call
        self.group = emitter.plan.group_name
        self.sizes = self.call(ops.even_sizes.default, pieces, self.group)
        self._parts: dict[int | None, Node] = {}

    def part(self, at: int | None) -> Node:
        if at not in self._parts:
            how = (aten.sum.dim_IntList, [0]) if at is None else (aten.select.int, 0, at)
            op, *args = how
            self._parts[at] = self.call(op, self.sizes, *args)
        return self._parts[at]

    def start(self, rows: Node, at: int | None = None) -> Node:
        part = self.part(at)
        return self.call(ops.all_to_all.default, rows, part, part, self.group)

    def wait(self, handle: Node, sent: Node, at: int | None = None) -> Node:
        part, count = self.part(at), self.call(aten.sym_size.int, sent, 0)
        return self.call(ops.wait.default, handle, sent, part, part, self.group, count)


def sent_tokens(emitter: Emitter) -> Node:
    """The tokens; of one expert each, weighed if the weights are on them."""
    parts = emitter.parts
    if not parts.weighs_tokens:
        return parts.tokens
    assert parts.weights is not None
    column = emitter.call(aten.reshape.default, parts.weights, [-1, 1])
    return weighed(emitter, parts.tokens, column)


def _capacity(emitter: Emitter) -> tuple[Any, ...]:
    return most_local_pairs(emitter), emitter.plan.capacity_factor, emitter.plan.drop


def most_local_pairs(emitter: Emitter) -> int:
    """The most pairs of a token that can go to one rank."""
    top_k = int(shape(emitter.parts.ids)[1])
    return min(top_k, emitter.plan.local_experts) if emitter.parts.distinct else top_k


def filled_share(emitter: Emitter) -> float:
    plan = emitter.plan
    top_k = int(shape(emitter.parts.ids)[1])
    return fill(top_k, plan.world_size, most_local_pairs(emitter), plan.capacity_factor)


def _copies(emitter: Emitter, node: Node) -> Node:
    """A copy for every rank."""
    return emitter.call(aten.cat.default, [node] * emitter.plan.world_size)


def _slices(emitter: Emitter, node: Node) -> list[Node]:
    chunks = emitter.plan.token_slices
    if chunks == 1:
        return [node]
    sliced = emitter.call(ops.rank_slices.default, node, emitter.plan.world_size, chunks)
    return [emitter.item(sliced, at) for at in range(chunks)]


def _summed(emitter: Emitter, shares: Node) -> Node:
    """Over dim 0; of a coarse dtype in float32."""
    dtype = _result_dtype(emitter)
    if dtype not in _COARSE:
        return emitter.call(aten.sum.dim_IntList, shares, [0])
    total = emitter.call(aten.sum.dim_IntList, shares, [0], dtype=torch.float32)
    return emitter.call(aten._to_copy.default, total, dtype=dtype)


def _result_dtype(emitter: Emitter) -> torch.dtype:
    dtype: torch.dtype = value(emitter.parts.combined).dtype
    return dtype
