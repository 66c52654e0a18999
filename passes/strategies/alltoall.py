"""Strategy "alltoall": each rank sends its rows to the ranks of their experts, in sizes that the
routing says.

Pseudo-code (in brackets: where there is more than one chunk)::

    [keys = chunk_keys(ids)]
    counts = expert_counts(ids);  recv = exchange_counts(counts);  sizes = split_sizes(counts, recv)
    rows, row_map = permute(tokens, ids)
    for each chunk, all started before the first is waited for:
        arrived = wait(all_to_all(rows));  rows, regroup_map = regroup(arrived, recv)
        rows = experts(rows)
        rows = unpermute(rows, regroup_map);  rows = wait(all_to_all(rows)), sizes swapped

Where a chunk has one expert a rank, its rows arrive sorted: nothing is regrouped.

Chunks of as many rows (``plan.row_slices``) are cut when all ranks' counts are known::

    counts = exchange_counts(a copy of expert_counts(ids) for each rank)
    sizes, recv, _ = cut_rows(counts);  rows, row_map = permute_cut(tokens, ids, sizes)
    for each piece: as above
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from moe_fx.graph.nodes import shape
from moe_fx.ops.cuts import shares
from moe_fx.passes.strategies.combine import combine
from moe_fx.passes.strategies.emitter import Emitter, weighed
from moe_fx.passes.strategies.local import pairs, permuted

aten = torch.ops.aten
ops = torch.ops.moe_fx


def alltoall(emitter: Emitter) -> Node:
    call, plan = emitter.call, emitter.plan
    if plan.row_slices > 1:
        return _cut_by_rows(emitter)
    chunks = plan.chunks
    keys: Node = emitter.parts.ids
    if chunks > 1:
        keys = call(
            ops.chunk_keys.default,
            emitter.parts.ids,
            plan.places,
            plan.world_size,
            plan.expert_slices,
            plan.token_slices,
        )
    counts = call(ops.expert_counts.default, keys, plan.places * plan.token_slices)
    by_chunk = {"chunks": chunks} if chunks > 1 else {}
    recv_counts = call(ops.exchange_counts.default, counts, plan.group_name, **by_chunk)
    sizes = call(ops.split_sizes.default, counts, recv_counts, **by_chunk)
    if chunks == 1:
        rows, row_map = permuted(emitter)
        return _there_and_back(emitter, [emitter.leaving(rows)], sizes, [recv_counts], row_map)
    pieces, row_map = _permuted_pieces(emitter, ops.permute_chunks.default, keys, sizes, chunks)
    per_slice = plan.experts_per_slice
    received = [
        call(aten.slice.Tensor, recv_counts, 1, at * per_slice, (at + 1) * per_slice)
        for at in range(chunks)
    ]
    return _there_and_back(emitter, pieces, sizes, received, row_map)


def _cut_by_rows(emitter: Emitter) -> Node:
    call, plan, ids = emitter.call, emitter.plan, emitter.parts.ids
    counts = call(ops.expert_counts.default, ids, plan.places)
    copies = call(aten.repeat.default, counts, [plan.world_size])
    counts = call(ops.exchange_counts.default, copies, plan.group_name)
    cut = call(ops.cut_rows.default, counts, plan.rank, plan.row_slices, plan.least_rows)
    sizes, recv_counts, of_experts = (emitter.item(cut, at) for at in range(3))
    num_pieces = len(shares(plan.row_slices))
    pieces, row_map = _permuted_pieces(emitter, ops.permute_cut.default, ids, sizes, num_pieces)
    received, its_counts = (
        [call(aten.select.int, of, 0, at) for at in range(num_pieces)]
        for of in (recv_counts, of_experts)
    )
    return _there_and_back(emitter, pieces, sizes, received, row_map, its_counts)


def _there_and_back(
    emitter: Emitter,
    pieces: list[Node],
    sizes: Node,
    received: list[Node],
    row_map: Node,
    counts: list[Node] | None = None,
) -> Node:
    """received ``[W, L / N]``: of each piece, rows from each rank for each local expert. counts
    ``[L / N]``: of all ranks together, if they are there."""
    trips = []
    for at, (rows, its_received) in enumerate(zip(pieces, received, strict=True)):
        both = emitter.call(aten.select.int, sizes, 0, at)
        expert_slice = at * emitter.plan.expert_slices // len(pieces)
        its_counts = None if counts is None else counts[at]
        trips.append(_Trip(emitter, rows, both, its_received, its_counts, expert_slice))
    done = [trip.there() for trip in trips]
    return combine(emitter, [trip.back() for trip in done], row_map)


class _Trip:
    """One piece's way to its experts and back."""

    def __init__(
        self,
        emitter: Emitter,
        rows: Node,
        sizes: Node,
        received: Node,
        counts: Node | None,
        expert_slice: int,
    ) -> None:
        self.emitter, self.call, self.plan = emitter, emitter.call, emitter.plan
        self.rows, self.received, self.expert_slice = rows, received, expert_slice
        self.counts = counts
        self.send = self.call(aten.select.int, sizes, 0, 0)
        self.recv = self.call(aten.select.int, sizes, 0, 1)
        self.handle = self.start(rows, self.send, self.recv)

    def start(self, rows: Node, send: Node, recv: Node) -> Node:
        return self.call(ops.all_to_all.default, rows, send, recv, self.plan.group_name)

    def there(self) -> _Trip:
        plan, group = self.plan, self.plan.group_name
        arrived = self.call(ops.wait.default, self.handle, self.rows, self.send, self.recv, group)
        counts = self.counts
        if counts is None:
            counts = self.call(aten.sum.dim_IntList, self.received, [0])
        if plan.experts_per_slice == 1:
            self.result = self.emitter.experts(arrived, counts, self.expert_slice)
        else:
            regrouped = self.call(ops.regroup.default, arrived, self.received)
            rows, row_map = self.emitter.item(regrouped, 0), self.emitter.item(regrouped, 1)
            done = self.emitter.experts(rows, counts, self.expert_slice)
            num_rows = self.call(aten.sym_size.int, rows, 0)
            sizes = [num_rows, *shape(self.emitter.parts.cut)[1:]]
            self.result = self.call(ops.unpermute.default, done, row_map, None, sizes)
        self.handle = self.start(self.result, self.recv, self.send)
        return self

    def back(self) -> Node:
        num_rows = self.call(aten.sym_size.int, self.rows, 0)
        arrived = self.call(
            ops.wait.default,
            self.handle,
            self.result,
            self.recv,
            self.send,
            self.plan.group_name,
            num_rows,
        )
        return self.emitter.back(arrived)


def _permuted_pieces(
    emitter: Emitter, op: Callable[..., Any], keys: Node, sizes: Node, num_pieces: int
) -> tuple[list[Node], Node]:
    parts, item, chunks = emitter.parts, emitter.item, range(num_pieces)
    permuted = emitter.call(op, parts.tokens, keys, sizes)
    pieces, row_map = item(permuted, 0), item(permuted, 1)
    rows = [item(pieces, at) for at in chunks]
    if parts.weighs_tokens:
        weights, _ = pairs(emitter)
        columns = [emitter.call(aten.reshape.default, n, [-1, 1]) for n in (weights, keys)]
        factors = item(emitter.call(op, *columns, sizes), 0)
        rows = [weighed(emitter, rows[at], item(factors, at)) for at in chunks]
    return [emitter.leaving(each) for each in rows], row_map
