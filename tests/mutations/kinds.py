"""Mistakes an MoE layer could be written with, made where its captured graph has a place for them.

A kind finds its places by what nodes *mean* (`moe_fx.passes.roles`), so it serves any captured
graph in which one layer is recognised.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moe_fx import passes
from moe_fx.options import Options
from moe_fx.passes.roles import (
    Combined,
    Counts,
    Grouped,
    PairIds,
    PairWeights,
    Permutation,
    Rows,
    Scratch,
    TokenIndex,
)
from moe_fx.report import Report
from tests.mutations.changes import (
    Change,
    Mutation,
    exchanged_with,
    followed_by,
    followed_by_input,
    reading,
    replaced_by,
    together,
    with_args,
    with_argument,
    with_keyword,
    without,
)

aten = torch.ops.aten
_SORTS = (aten.sort.default, aten.argsort.default, aten.sort.stable, aten.argsort.stable)
_REVERSED = followed_by((aten.flip.default, [0]))

Place = tuple[Node, str, Change]


@dataclass(frozen=True)
class Layer:
    """The layer of a captured graph. All nodes are those of that graph.

    roles: of the region's nodes; experts, pairs: how many there are.
    """

    module: GraphModule
    roles: dict[Node, Any]
    ids: Node
    weights: Node | None
    cut: Node
    combined: Node
    tables: tuple[Node, ...]
    dispatched: tuple[Node, ...]
    experts: int
    pairs: int

    def having(self, *kinds: type) -> Iterator[Node]:
        return (node for node, role in self.roles.items() if isinstance(role, kinds))

    def calls(self, *targets: Any) -> Iterator[Node]:
        return (node for node in self.module.graph.nodes if node.target in targets)


def layer_of(module: GraphModule) -> Layer:
    """Raises ValueError unless exactly one layer is recognised."""
    report = Report()
    context = passes.Context(Options(verify="off"), report)
    passes.run(module, context, passes.for_ranks(1, passes=passes.ANALYSIS))
    if len(context.regions) != 1:
        raise ValueError(f"expected one MoE layer in the graph:\n{report.to_text()}")
    (region,), origin = context.regions, context.origin
    parts = region.parts

    def many(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
        return tuple(origin[node] for node in nodes if node in origin)

    return Layer(
        module=module,
        roles={origin[node]: role for node, role in parts.roles.items() if node in origin},
        ids=origin[parts.ids],
        weights=None if parts.weights is None else origin[parts.weights],
        cut=origin[parts.cut],
        combined=origin[parts.combined],
        tables=many(parts.tables),
        dispatched=many(parts.dispatched),
        experts=region.num_experts,
        pairs=origin[parts.ids].meta["val"].numel(),
    )


def swapped_gate_and_up(layer: Layer) -> Iterator[Place]:
    slices = layer.calls(aten.slice.Tensor)
    halves = [node for node in slices if isinstance(layer.roles.get(node), Rows)]
    for node in layer.calls(operator.getitem):
        if isinstance(layer.roles.get(node), Rows):
            halves.append(node)
    if len(halves) == 2:
        yield halves[0], "exchanged", exchanged_with(halves[1].name)


def wrong_renormalisation_axis(layer: Layer) -> Iterator[Place]:
    for node in layer.calls(aten.sum.dim_IntList, aten.softmax.int):
        if isinstance(layer.roles.get(node), (Rows, Grouped, Combined)):
            continue
        if node.meta["val"].dim() == 2 and node.meta["val"].is_floating_point():
            dim: Any = 0 if node.target is aten.softmax.int else [0]
            yield node, "over tokens", with_argument(1, dim)


def weights_applied_twice(layer: Layer) -> Iterator[Place]:
    for node in filter(None, (layer.weights, *layer.having(PairWeights))):
        if _is_floating(node):
            yield node, "squared", followed_by((aten.mul.Tensor, node))
    for product, _, weights in _weighted(layer):
        yield product, "twice", followed_by((aten.mul.Tensor, weights))


def off_by_one_expert(layer: Layer) -> Iterator[Place]:
    next_expert = ((aten.add.Tensor, 1), (aten.remainder.Scalar, layer.experts))
    for node in (layer.ids, *layer.having(PairIds)):
        yield node, "the next expert", followed_by(*next_expert)
    for node in layer.having(Counts):
        yield node, "of the next expert", followed_by((aten.roll.default, [1]))
    for node in layer.calls(aten.histc.default):
        bins = node.args[1]
        yield node, "bins from one", with_args(node.args[0], bins, 1, bins)


def dropped_scale(layer: Layer) -> Iterator[Place]:
    for node in layer.calls(aten.mul.Tensor, aten.div.Tensor):
        divides = node.target is aten.div.Tensor
        if _is_floating(node) and (divides or not isinstance(node.args[1], Node)):
            yield node, "left out", without
    for product, rows, _ in _weighted(layer):
        yield product, "weights left out", replaced_by(rows.name)


def transposed_layout(layer: Layer) -> Iterator[Place]:
    seen: set[Node] = set()
    for table in layer.tables:
        node: Any = table
        while isinstance(node, Node) and node not in seen and _is_square(node):
            seen.add(node)
            yield node, "transposed", followed_by((aten.transpose.int, -2, -1))
            node = node.args[0] if node.args else None


def residual_moved_inside(layer: Layer) -> Iterator[Place]:
    """``x + moe(x)`` becomes the sum over experts of what each adds to its rows."""
    outer = None
    for node in layer.calls(aten.add.Tensor):
        sources = [n for n in node.all_input_nodes if _depends_on(n, layer.combined)]
        if node not in layer.roles and len(sources) == 1:
            outer = (node.name, replaced_by(sources[0].name))
    results = [layer.cut, *(product for product, _, _ in _weighted(layer))]
    for result in results:
        for rows in layer.dispatched:
            if _like(rows, result) and _order(layer, rows) == _order(layer, result):
                inside = (result.name, followed_by((aten.add.Tensor, rows)))
                yield result, f"plus {rows.name}", together(*filter(None, (inside, outer)))


def stale_counts(layer: Layer) -> Iterator[Place]:
    alike = ((aten.mul.Tensor, 0), (aten.add.Tensor, layer.pairs // layer.experts))
    for node in layer.having(Counts):
        yield node, "in reverse", _REVERSED
        if layer.roles[node].offsets:
            yield node, "no running sum", replaced_by(node.all_input_nodes[0].name)
            yield node, "one less", followed_by((aten.sub.Tensor, 1), (aten.clamp.default, 0))
        else:
            yield node, "all alike", followed_by(*alike)
            yield node, "all to the first", followed_by((aten.cumsum.default, 0))


def descending_sort(layer: Layer) -> Iterator[Place]:
    for node in layer.calls(*_SORTS):
        stable = node.target in (aten.sort.stable, aten.argsort.stable)
        change = with_keyword("descending", True) if stable else with_argument(2, True)
        yield node, "descending", change
        yield node, "of negated ids", followed_by_input(aten.neg.default)
    for node in layer.calls(aten.topk.default):
        yield node, "lowest", with_argument(3, False)


def wrong_permutation(layer: Layer) -> Iterator[Place]:
    orders = [
        node
        for node in layer.having(Permutation, TokenIndex, PairIds, Scratch)
        if _is_vector(node, layer.pairs)
    ]
    for node in orders:
        yield node, "in reverse", _REVERSED
        if isinstance(layer.roles[node], Permutation):
            yield node, "inverted", followed_by((aten.argsort.default,))
    for node in layer.roles:
        for read in node.all_input_nodes:
            for other in orders:
                if read in orders and other is not read and other < node:
                    yield (
                        node,
                        f"reads {other.name} for {read.name}",
                        reading(other.name, read.name),
                    )
    for node in layer.calls(aten.repeat_interleave.self_int):
        tiled = with_args(node.args[0], [node.args[1], 1], target=aten.repeat.default)
        yield node, "tiled", tiled


Kind = Callable[[Layer], Iterator[Place]]
KINDS: tuple[Kind, ...] = (
    swapped_gate_and_up,
    wrong_renormalisation_axis,
    weights_applied_twice,
    off_by_one_expert,
    dropped_scale,
    transposed_layout,
    residual_moved_inside,
    stale_counts,
    descending_sort,
    wrong_permutation,
)


def mistakes(module: GraphModule) -> Iterator[Mutation]:
    """Those of every kind that the graph has a place for."""
    layer = layer_of(module)
    for kind in KINDS:
        for node, label, change in kind(layer):
            yield Mutation(node.name, label, change, kind.__name__.replace("_", " "))


def _weighted(layer: Layer) -> Iterator[tuple[Node, Node, Node]]:
    """(product, rows, weights) wherever rows meet their routing weights."""
    for node in layer.calls(aten.mul.Tensor):
        factors = [n for n in node.all_input_nodes if _is_weights(layer, n)]
        rows = [n for n in node.all_input_nodes if n not in factors]
        if node in layer.roles and len(factors) == len(rows) == 1:
            yield node, rows[0], factors[0]


def _is_weights(layer: Layer, node: Node) -> bool:
    return node is layer.weights or isinstance(layer.roles.get(node), PairWeights)


def _is_floating(node: Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.is_floating_point()


def _is_square(node: Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.dim() == 3 and val.shape[1] == val.shape[2]


def _is_vector(node: Node, length: int) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and tuple(val.shape) == (length,)


def _like(node: Node, other: Node) -> bool:
    left, right = node.meta["val"], other.meta["val"]
    return bool(left.shape == right.shape and left.dtype == right.dtype)


def _order(layer: Layer, node: Node) -> str:
    return getattr(layer.roles.get(node), "order", "")


def _depends_on(node: Node, source: Node) -> bool:
    return node is source or any(_depends_on(n, source) for n in node.all_input_nodes)
