"""How rows travel between tokens and experts, strategy by strategy.

``TRAVEL[plan.strategy](emitter)`` emits everything from tokens to the region's result. Here:
strategies whose sizes the routing says; those with fixed sizes are in `travel_even.py` and
`travel_mc2.py`.

Pseudo-code of "alltoall" (in brackets: where there is more than one chunk)::

    [keys = chunk_keys(ids)]
    counts = expert_counts(ids);  recv = exchange_counts(counts);  sizes = split_sizes(counts, recv)
    rows, row_map = permute(tokens, ids)
    for each chunk, all started before the first is waited for:
        arrived = wait(all_to_all(rows));  rows, regroup_map = regroup(arrived, recv)
        rows = experts(rows)
        rows = unpermute(rows, regroup_map);  rows = wait(all_to_all(rows)), sizes swapped

Where a chunk has one expert a rank, its rows arrive sorted: nothing is regrouped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from moe_fx.passes.combine import combine
from moe_fx.passes.emitter import Emitter, weighed
from moe_fx.passes.roles import shape
from moe_fx.passes.travel_even import allgather, padded_alltoall
from moe_fx.passes.travel_mc2 import mc2

aten = torch.ops.aten
ops = torch.ops.moe_fx


def local(emitter: Emitter) -> Node:
    parts = emitter.parts
    counts = emitter.call(ops.expert_counts.default, parts.ids, emitter.plan.num_experts)
    rows, row_map = _permuted(emitter)
    return combine(emitter, [emitter.experts(rows, counts)], row_map)


def alltoall(emitter: Emitter) -> Node:
    call, plan = emitter.call, emitter.plan
    chunks = plan.chunks
    keys: Node = emitter.parts.ids
    if chunks > 1:
        keys = call(
            ops.chunk_keys.default,
            emitter.parts.ids,
            plan.num_experts,
            plan.world_size,
            plan.expert_slices,
            plan.token_slices,
        )
    counts = call(ops.expert_counts.default, keys, plan.num_experts * plan.token_slices)
    by_chunk = {"chunks": chunks} if chunks > 1 else {}
    recv_counts = call(ops.exchange_counts.default, counts, plan.group_name, **by_chunk)
    sizes = call(ops.split_sizes.default, counts, recv_counts, **by_chunk)
    if chunks > 1:
        pieces, row_map = _permuted_chunks(emitter, keys, sizes)
    else:
        rows, row_map = _permuted(emitter)
        pieces = [rows]
    trips = [_Trip(emitter, rows, sizes, recv_counts, at) for at, rows in enumerate(pieces)]
    done = [trip.there() for trip in trips]
    return combine(emitter, [trip.back() for trip in done], row_map)


class _Trip:
    """One chunk's way to its experts and back."""

    def __init__(
        self, emitter: Emitter, rows: Node, sizes: Node, recv_counts: Node, at: int
    ) -> None:
        self.emitter, self.call, self.plan = emitter, emitter.call, emitter.plan
        self.rows, self.recv_counts, self.at = rows, recv_counts, at
        both = self.call(aten.select.int, sizes, 0, at)
        self.send = self.call(aten.select.int, both, 0, 0)
        self.recv = self.call(aten.select.int, both, 0, 1)
        self.handle = self.start(rows, self.send, self.recv)

    def start(self, rows: Node, send: Node, recv: Node) -> Node:
        return self.call(ops.all_to_all.default, rows, send, recv, self.plan.group_name)

    def there(self) -> _Trip:
        plan, group = self.plan, self.plan.group_name
        arrived = self.call(ops.wait.default, self.handle, self.rows, self.send, self.recv, group)
        recv_counts = self.recv_counts
        per_slice = plan.experts_per_slice
        if plan.chunks > 1:
            first = self.at * per_slice
            recv_counts = self.call(aten.slice.Tensor, recv_counts, 1, first, first + per_slice)
        counts = self.call(aten.sum.dim_IntList, recv_counts, [0])
        at = self.at // plan.token_slices
        if per_slice == 1:
            self.result = self.emitter.experts(arrived, counts, at)
        else:
            regrouped = self.call(ops.regroup.default, arrived, recv_counts)
            rows, row_map = self.emitter.item(regrouped, 0), self.emitter.item(regrouped, 1)
            done = self.emitter.experts(rows, counts, at)
            num_rows = self.call(aten.sym_size.int, rows, 0)
            sizes = [num_rows, *shape(self.emitter.parts.cut)[1:]]
            self.result = self.call(ops.unpermute.default, done, row_map, None, sizes)
        self.handle = self.start(self.result, self.recv, self.send)
        return self

    def back(self) -> Node:
        num_rows = self.call(aten.sym_size.int, self.rows, 0)
        return self.call(
            ops.wait.default,
            self.handle,
            self.result,
            self.recv,
            self.send,
            self.plan.group_name,
            num_rows,
        )


def _permuted(emitter: Emitter) -> tuple[Node, Node]:
    parts = emitter.parts
    permuted = emitter.call(ops.permute.default, parts.tokens, parts.ids)
    rows, row_map = emitter.item(permuted, 0), emitter.item(permuted, 1)
    if parts.weighs_tokens:
        columns = [emitter.call(aten.reshape.default, n, [-1, 1]) for n in _pairs(emitter)]
        factor = emitter.item(emitter.call(ops.permute.default, *columns), 0)
        rows = weighed(emitter, rows, factor)
    return rows, row_map


def _permuted_chunks(emitter: Emitter, keys: Node, sizes: Node) -> tuple[list[Node], Node]:
    parts, item, chunks = emitter.parts, emitter.item, range(emitter.plan.chunks)
    permuted = emitter.call(ops.permute_chunks.default, parts.tokens, keys, sizes)
    pieces, row_map = item(permuted, 0), item(permuted, 1)
    rows = [item(pieces, at) for at in chunks]
    if parts.weighs_tokens:
        weights, _ = _pairs(emitter)
        columns = [emitter.call(aten.reshape.default, n, [-1, 1]) for n in (weights, keys)]
        factors = item(emitter.call(ops.permute_chunks.default, *columns, sizes), 0)
        rows = [weighed(emitter, rows[at], item(factors, at)) for at in chunks]
    return rows, row_map


def _pairs(emitter: Emitter) -> tuple[Node, Node]:
    assert emitter.parts.weights is not None
    return emitter.parts.weights, emitter.parts.ids


TRAVEL: dict[str, Callable[[Emitter], Node]] = {
    "local": local,
    "gather_weights": local,
    "alltoall": alltoall,
    "padded_alltoall": padded_alltoall,
    "allgather": allgather,
    "mc2": mc2,
}
