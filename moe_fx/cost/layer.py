"""How long a layer takes under each plan: an explicit simulation of two resources.

The *compute thread* runs one thing at a time; the *link* carries exchanges in the order in which
they were queued. A layer is a pipeline over its pieces::

    prepare; exchange counts (or sizes); queue every dispatch
    for each piece: wait for its rows; run its experts; queue its combine
    wait for the combines; finish

Work that depends on neither side (a shared expert) is done while there is nothing else to do, and
what is then left of it at the end.

Against measurements (docs/overlap.md, the chosen plan, on a quiet machine): forward 8 to 14 % too
long, since the busiest rank is expected to get 1.1 times the mean; forward and backward from 6 %
too short to 19 % too long. Mixtral-like layers, of few experts: from 19 % too short to 12 % too
long; with Zipf routing the busiest rank has more than expected. On a machine that others use too,
from 32 % too short to 13 % too long; twice too long where other work ran while rates were measured.

Training adds the same pipeline for the gradients of rows; those of weights lead to no exchange and
fill the waiting: of each piece once it is done, or where they are summed as one product, of all
once the last one is.

::

    best, predictions = choose(layer, link, compute, [Choice(n) for n in (1, 2, 4)])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_fx.blocks import most_experts
from moe_fx.cost.link import Link
from moe_fx.cost.pipeline import Pipeline, Prediction, simulate
from moe_fx.cost.rates import Compute
from moe_fx.ops.cuts import shares
from moe_fx.plan import Span

__all__ = ["Choice", "Layer", "choose", "predict", "timeline"]

WORTHWHILE = 0.01
"""Share of a layer's time that more pieces must save to be chosen. Measured (docs/overlap.md), they
save more than predicted where the link is as long as the compute: 3 to 16 % from 4 chunks to 8,
predicted 4 to 7 %."""
UNCERTAIN = 0.06
"""The same, of each doubling of token slices on top: what their shorter matrix products cost is
known the least. Measured, all-gathers in 4 and 8 slices took from 3 to 30 % more than predicted
beside all-to-alls by rows."""


@dataclass(frozen=True)
class Layer:
    """One MoE layer as one rank sees it.

    tokens: T, of this rank. matmuls: (D, N) of each matrix product of an expert, in order.
    shared: the same of a shared expert. dispatch_bytes, combine_bytes: of a row on its way to its
    expert, and back. skew: rows of the busiest rank over the mean (1.1: routers trained for
    balance; 1.0: even); all wait for the busiest. sums_gradients: those of weights are one product
    for each expert, whatever the chunks (`moe_fx.passes.overlap.sum_gradients`).
    """

    tokens: int
    top_k: int
    num_experts: int
    world_size: int
    matmuls: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    dispatch_bytes: float
    combine_bytes: float
    training: bool = False
    skew: float = 1.1
    shared: tuple[tuple[int, int], ...] = ()
    sums_gradients: bool = False

    def __post_init__(self) -> None:
        if self.world_size < 2:
            raise ValueError(f"{self.world_size} rank(s): nothing is exchanged by one")

    @property
    def local_experts(self) -> int:
        """Of a rank; the last ranks may have fewer."""
        return most_experts(self.num_experts, self.world_size)

    @property
    def rows(self) -> int:
        """T * k, the rows that a rank sends, and receives on average; own ones included."""
        return self.tokens * self.top_k

    @property
    def most(self) -> int:
        """Experts of one rank that a token can select."""
        return min(self.top_k, self.local_experts)

    @property
    def reached(self) -> float:
        """The expected share of the ranks that have one of a token's experts, these being drawn
        evenly."""
        others, top_k = self.num_experts - self.local_experts, self.top_k
        return 1 - math.comb(others, top_k) / math.comb(self.num_experts, top_k)

    def fill(self, capacity_factor: float | None) -> float:
        """The share of a buffer's rows that are expected to be used."""
        return fill(self.top_k, self.world_size, self.most, capacity_factor)


def fill(top_k: int, world_size: int, most: int, capacity_factor: float | None) -> float:
    """The share of `moe_fx.ops.padded.slots` that the mean number of pairs fills."""
    least = top_k / (world_size * most)
    return min(1.0, max(least, 1 / capacity_factor if capacity_factor else 0.0))


@dataclass(frozen=True)
class Choice:
    """The exchange is cut into chunks: by experts each GEMM stays whole, by tokens each chunk has
    rows of every expert, by rows (instead of both) some experts are cut in two. strategy,
    capacity_factor: as in `moe_fx.plan.ExchangePlan`."""

    expert_slices: int = 1
    token_slices: int = 1
    strategy: str = "alltoall"
    capacity_factor: float | None = None
    row_slices: int = 1

    @property
    def chunks(self) -> int:
        return self.expert_slices * self.token_slices * self.row_slices

    @property
    def shares(self) -> list[float]:
        """Of the rows, of each piece."""
        if self.row_slices > 1:
            return [part / (2 * self.row_slices) for part in shares(self.row_slices)]
        return [1 / self.chunks] * self.chunks

    def legal(self, layer: Layer) -> bool:
        if min(self.expert_slices, self.row_slices) < 1:
            return False
        if not 1 <= self.token_slices <= max(1, layer.tokens):
            return False
        if self.strategy != "alltoall" and self.expert_slices * self.row_slices > 1:
            return False
        if self.row_slices > 1 and layer.training and not layer.sums_gradients:
            return False
        if self.row_slices > 1 and self.chunks > self.row_slices:
            return False
        return layer.local_experts % self.expert_slices == 0


def predict(layer: Layer, link: Link, compute: Compute, choice: Choice) -> Prediction:
    """The time of one pass (training: forward and backward) of ``layer`` on the busiest rank.

    ``ValueError`` if the layer can't be run that way. Ignored: own rows' way through the exchange,
    the routing itself (the same for all), the network's own use of the processor.
    """
    if not choice.legal(layer):
        raise ValueError(f"{choice} does not fit {layer}")
    pipeline = _PIPELINES[choice.strategy]
    forward = simulate(pipeline(layer, compute, choice, False), link)
    if not layer.training:
        return forward
    return forward + simulate(pipeline(layer, compute, choice, True), link)


def choose(
    layer: Layer, link: Link, compute: Compute, candidates: Sequence[Choice]
) -> tuple[Choice, list[Prediction]]:
    """The best candidate, and what is predicted for each, in the order given.

    Fewer chunks unless more save over 1 % (`WORTHWHILE`) of the time, token slices 6 % more each
    time that they double (`UNCERTAIN`); then the fastest; then the first.
    """
    if not candidates:
        raise ValueError("no candidates to choose from")
    predictions = [predict(layer, link, compute, candidate) for candidate in candidates]
    held = [
        p.seconds * (1 + UNCERTAIN * math.log2(c.token_slices))
        for p, c in zip(predictions, candidates, strict=True)
    ]
    near = [i for i, seconds in enumerate(held) if min(held) >= seconds * (1 - WORTHWHILE)]
    best = min(near, key=lambda i: (candidates[i].chunks, held[i], i))
    return candidates[best], predictions


def timeline(layer: Layer, link: Link, compute: Compute, choice: Choice) -> tuple[Span, ...]:
    """What the forward's compute thread and link are predicted to do, by when it ends."""
    spans: list[Span] = []
    simulate(_PIPELINES[choice.strategy](layer, compute, choice, False), link, spans)
    return tuple(sorted(spans, key=lambda span: (span.end, span.lane)))


# -- a layer as a pipeline -------------------------------------------------------------------------


def _alltoall(layer: Layer, compute: Compute, choice: Choice, backward: bool) -> Pipeline:
    """Rows go to the ranks of their experts: permute, (regroup, experts, regroup), join, sum."""
    all_rows = all_slots = layer.rows * layer.skew
    if choice.strategy == "padded_alltoall":
        all_slots = layer.rows / layer.fill(choice.capacity_factor)
    travelling = all_slots * (layer.world_size - 1) / layer.world_size
    work, pieces = [], []
    for share in choice.shares:
        experts = layer.local_experts / choice.expert_slices
        if choice.row_slices > 1:
            experts = max(1.0, layer.local_experts * share)
        rows, slots = all_rows * share, all_slots * share
        pieces.append((rows, experts))
        seconds = _experts(layer, compute, rows, slots, experts)
        seconds += compute.copy_seconds(slots * (layer.dispatch_bytes + layer.combine_bytes))
        work.append(seconds + compute.piece_seconds())
    returned = layer.rows * layer.combine_bytes
    joined = compute.copy_seconds(returned) if choice.chunks > 1 else 0.0
    cut = compute.cut_seconds() if choice.row_slices > 1 and not backward else 0.0
    return Pipeline(
        before=cut + compute.copy_seconds(layer.rows * layer.dispatch_bytes),
        dispatch=[travelling * layer.dispatch_bytes * share for share in choice.shares],
        work=work,
        combine=[travelling * layer.combine_bytes * share for share in choice.shares],
        after=joined + compute.copy_seconds(2 * returned),
        filler=_shared(layer, compute, backward),
        piece_fillers=_weight_gradients(layer, compute, pieces, choice, backward),
    )


def _allgather(layer: Layer, compute: Compute, choice: Choice, backward: bool) -> Pipeline:
    """Every token goes to every rank, and each rank's share of its result back: copy, (permute,
    experts, sum), sum of the shares."""
    pieces = choice.chunks
    rows = layer.rows * layer.skew / pieces
    slots = layer.rows / layer.fill(choice.capacity_factor) / pieces
    everyone = layer.tokens * layer.world_size
    travelling = layer.tokens * (layer.world_size - 1) / pieces
    cut = [(rows, layer.local_experts)] * pieces
    work = _experts(layer, compute, rows, slots, layer.local_experts)
    work += compute.copy_seconds(slots * layer.dispatch_bytes + rows * layer.combine_bytes)
    return Pipeline(
        before=compute.copy_seconds(2 * everyone * layer.dispatch_bytes),
        dispatch=[travelling * (layer.dispatch_bytes + _PAIR_BYTES * layer.top_k)] * pieces,
        work=[work + compute.piece_seconds()] * pieces,
        combine=[travelling * layer.combine_bytes] * pieces,
        after=compute.copy_seconds(2 * everyone * layer.combine_bytes),
        filler=_shared(layer, compute, backward),
        piece_fillers=_weight_gradients(layer, compute, cut, choice, backward),
    )


_PAIR_BYTES = 8
"""Of a pair's expert id and routing weight."""


def _direct(layer: Layer, compute: Compute, choice: Choice, backward: bool) -> Pipeline:
    """Every token goes once to each rank of its experts, and that rank's share of its result back;
    its ids and weights go to every rank."""
    rows = layer.rows * layer.skew
    there = layer.tokens * layer.world_size * layer.reached
    travelling = layer.tokens * (layer.world_size - 1) * layer.reached
    pairs = layer.tokens * (layer.world_size - 1) * layer.top_k * _PAIR_BYTES
    work = _experts(layer, compute, rows, rows, layer.local_experts)
    work += compute.copy_seconds(rows * (layer.dispatch_bytes + layer.combine_bytes))
    return Pipeline(
        before=compute.copy_seconds(there * layer.dispatch_bytes),
        dispatch=[travelling * layer.dispatch_bytes + pairs],
        work=[work + compute.piece_seconds()],
        combine=[travelling * layer.combine_bytes],
        after=compute.copy_seconds(2 * there * layer.combine_bytes),
        filler=_shared(layer, compute, backward),
        piece_fillers=_weight_gradients(
            layer, compute, [(rows, layer.local_experts)], choice, backward
        ),
    )


def _gather_weights(layer: Layer, compute: Compute, choice: Choice, backward: bool) -> Pipeline:
    """Every expert comes to every rank; nothing is computed meanwhile."""
    elements = sum(d * n for d, n in layer.matmuls) * layer.num_experts
    travelling = elements * layer.dtype.itemsize * (layer.world_size - 1) / layer.world_size
    rows, experts = layer.rows, layer.num_experts
    return Pipeline(
        before=compute.copy_seconds(rows * layer.dispatch_bytes),
        dispatch=[travelling],
        work=[_experts(layer, compute, rows, rows, experts)],
        combine=[travelling if backward else 0.0],
        after=compute.copy_seconds(2 * rows * layer.combine_bytes),
        filler=_shared(layer, compute, backward),
        piece_fillers=_weight_gradients(layer, compute, [(rows, experts)], choice, backward),
    )


_PIPELINES = {
    "alltoall": _alltoall,
    "padded_alltoall": _alltoall,
    "allgather": _allgather,
    "direct": _direct,
    "gather_weights": _gather_weights,
}
PRICED = frozenset(_PIPELINES)
"""Strategies that the model knows."""


def _experts(layer: Layer, compute: Compute, rows: float, slots: float, experts: float) -> float:
    """Matrix products of ``rows`` rows in all, and between them a pass over what the first of two
    produced and the second reads (the activation); both also over slots without a row, which are
    set to zero. Their gradient takes as long."""
    seconds = _products(layer, compute, layer.matmuls, rows / experts, experts)
    outputs = sum(n for _, n in layer.matmuls[:-1]) + sum(n for _, n in layer.matmuls)
    return seconds + compute.copy_seconds(max(0.0, slots - rows) * outputs * layer.dtype.itemsize)


def _weight_gradients(
    layer: Layer,
    compute: Compute,
    pieces: Sequence[tuple[float, float]],
    choice: Choice,
    backward: bool,
) -> list[float]:
    """Of each piece of (rows, experts): products, stored; by slices of tokens added to those of the
    slice before. Summed as one: all of it with the last piece. Forward: none."""
    if not backward:
        return []
    passes = 2 if choice.token_slices > 1 and not layer.sums_gradients else 1
    before: list[float] = []
    if layer.sums_gradients and len(pieces) > 1:
        before = [0.0] * (len(pieces) - 1)
        pieces = [(sum(rows for rows, _ in pieces), layer.local_experts)]
    elements = sum(d * n for d, n in layer.matmuls)
    return before + [
        sum(compute.gemm_seconds(rows / experts, d, n, experts) for d, n in layer.matmuls)
        + compute.copy_seconds(passes * experts * elements * layer.dtype.itemsize)
        for rows, experts in pieces
    ]


def _shared(layer: Layer, compute: Compute, backward: bool) -> float:
    forward = _products(layer, compute, layer.shared, layer.tokens, 1)
    return 2 * forward if backward else forward


def _products(
    layer: Layer,
    compute: Compute,
    matmuls: Sequence[tuple[int, int]],
    rows: float,
    groups: float,
) -> float:
    """Of ``rows`` of each group, a pass over what all but the last produce, and new buffers of what
    each reads (the first finds it there) and produces."""
    row_bytes = rows * groups * layer.dtype.itemsize
    gemms = sum(compute.gemm_seconds(rows, d, n, groups) for d, n in matmuls)
    widths = [n for _, n in matmuls] + [d for d, _ in matmuls[1:]]
    fresh = sum(compute.fresh_seconds(row_bytes * width) for width in widths)
    return gemms + fresh + compute.copy_seconds(row_bytes * sum(n for _, n in matmuls[:-1]))
