"""Rules for ops on a value's dims: along features they are copied, and of the others they may only
pick, repeat or reorder rows."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from moe_fx.compat import number, symbols
from moe_fx.graph.feature_dims import DIM_OF, KEEPS_DIMS, TRAILING, regrouped
from moe_fx.graph.nodes import argument, shape
from moe_fx.graph.refusal import Refusal
from moe_fx.passes.recognise.by_value.rows.layout import Laid, Layout

aten = torch.ops.aten

_UNKNOWN = 10007  # a data-dependent number of rows: no other size is a multiple of it

READS_BY_INDEX = {
    aten.index.Tensor: 1,
    aten.index_select.default: 2,
    aten.gather.default: 2,
    aten.embedding.default: 1,
}

WRITES_BY_INDEX = {
    aten.index_copy.default: 3,
    aten.index_put.default: 2,
    aten.index_add.default: 3,
    aten.scatter.src: 3,
    aten.scatter_add.default: 3,
}

_SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
)

_PICKS = (*_SPLITS, aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.flip.default)


class LayoutMoves(Layout):
    """See `row_layout.py` for the contract of a rule."""

    def _item(self, node: Node) -> Laid:
        source: Any = node.args[0]
        laid = self.laid[source]
        if source.target in _SPLITS and not _along_feature(self, source):
            rank = len(shape(node))
            dropped = source.target is aten.unbind.int
            return self.moved(node, laid, trailing(laid, rank) if dropped else laid.features)
        if laid.node is None:
            return Laid(laid.kind, (False,) * len(shape(node)))
        item = self.call(operator.getitem, laid.node, node.args[1])
        features = laid.features
        if source.target is aten.unbind.int:
            dim = argument(source, 1, "dim", 0) % len(features)
            features = features[:dim] + features[dim + 1 :]
        return Laid(laid.kind, features, item, laid.met)

    def _view(self, node: Node) -> Laid:
        source: Any = node.args[0]
        laid = self.laid[source]
        known = symbols([*shape(source), *shape(node)], _UNKNOWN)
        before = [number(size, known) for size in shape(source)]
        after = [number(size, known) for size in shape(node)]
        features = regrouped(before, laid.features, after)
        if features is None:
            raise Refusal(f"the reshape to {list(shape(node))} mixes rows and features", node, 3)
        if laid.node is None:
            return Laid(laid.kind, features)
        sizes = self._features_of(node, features)
        if sizes == self._features_of(source, laid.features):
            return self.moved(node, laid, features)
        return Laid(
            laid.kind, features, self.call(aten.reshape.default, laid.node, [-1, *sizes]), laid.met
        )

    def _permuted(self, node: Node) -> Laid:
        source: Any = node.args[0]
        laid, rank = self.laid[source], len(shape(source))
        if node.target is aten.permute.default:
            order = [dim % rank for dim in argument(node, 1, "dims")]
        else:
            order = list(range(rank))
            one, other = (argument(node, at, f"dim{at - 1}") % rank for at in (1, 2))
            order[one], order[other] = other, one
        return self.reordered(laid, order)

    def _unsqueezed(self, node: Node) -> Laid:
        laid = self.laid[node.args[0]]  # type: ignore[index]
        dim = argument(node, 1, "dim") % len(shape(node))
        features = (*laid.features[:dim], False, *laid.features[dim:])
        if laid.kind == "table":
            return self._new_feature(node, laid, features, dim)
        return self.moved(node, laid, features)

    def _new_feature(self, node: Node, laid: Laid, features: Sequence[bool], dim: int) -> Laid:
        """A dim of a table of one expert: all its dims are features."""
        features = tuple(at == dim or feature for at, feature in enumerate(features))
        sizes = self._features_of(node, features)
        reshaped = self.call(aten.reshape.default, laid.node, [self.num_experts, *sizes])
        return Laid(laid.kind, features, reshaped, laid.met)

    def _squeezed(self, node: Node) -> Laid:
        laid = self.laid[node.args[0]]  # type: ignore[index]
        dim = argument(node, 1, "dim") % len(laid.features)
        if len(shape(node)) == len(laid.features):
            return laid
        features = laid.features[:dim] + laid.features[dim + 1 :]
        if not laid.features[dim] or laid.node is None:
            return self.moved(node, laid, features)
        at = laid.at.index(dim) + 1
        return Laid(laid.kind, features, self.call(aten.squeeze.dim, laid.node, at), laid.met)

    def _moving(self, node: Node) -> Laid:
        """Repeats of rows: along features nothing may change."""
        source: Any = node.args[0]
        laid, rank = self.laid[source], len(shape(node))
        features = (*[False] * (rank - len(laid.features)), *laid.features)
        if self._features_of(node, features) != self._features_of(source, laid.features):
            raise Refusal(f"{node.target} repeats along features", node, 3)
        if node.target is aten.repeat_interleave.self_int and argument(node, 2, "dim") is None:
            raise Refusal("repeat_interleave without a dim flattens rows and features", node, 3)
        return self.moved(node, laid, features)

    def _read(self, node: Node) -> Laid:
        """By index: rows change places; a table is looked up for each row."""
        source: Any = node.args[0]
        laid = self.laid[source]
        index: Any = node.args[READS_BY_INDEX[node.target]]  # type: ignore[index]
        indices = [i for i in (index if isinstance(index, (list, tuple)) else [index]) if i]
        if any(self.laid[i].kind not in ("route", "buffer") for i in indices):
            raise Refusal("rows are indexed by something that is not routing", node, 3)
        rank = len(shape(node))
        if laid.kind == "constant":
            if node.target is aten.gather.default or (
                isinstance(index, (list, tuple)) and len(index) != 1
            ):
                raise Refusal(f"{source} is looked up in a way not known", node, 3)
            dims = list(range(1, len(shape(source))))
            looked_up = rank - len(dims)
            features = (*[False] * looked_up, *[True] * len(dims))
            return Laid("table", features, self.table(source, 0, dims))
        if node.target is aten.gather.default:
            return self.moved(node, laid, laid.features)
        return self.moved(node, laid, trailing(laid, rank, node))

    def _written(self, node: Node) -> Laid:
        buffer: Any = node.args[0]
        if self.laid[buffer].kind not in ("buffer", "rows"):
            raise Refusal("rows are written into something that is not empty", node, 3)
        laid = self.laid[node.args[WRITES_BY_INDEX[node.target]]]  # type: ignore[index]
        return self.moved(node, laid, trailing(laid, len(shape(node)), node))

    def _padded(self, node: Node) -> Laid:
        laid = self.laid[node.args[0]]  # type: ignore[index]
        pads: Any = node.args[1]
        for at in range(0, len(pads), 2):
            if (pads[at] or pads[at + 1]) and laid.features[-1 - at // 2]:
                raise Refusal("features are padded", node, 3)
        return self.moved(node, laid, laid.features)

    def _along(self, node: Node) -> Laid:
        """An op along some dims: along features it is copied; along the others it may only pick
        or split rows."""
        source: Any = node.args[0]
        laid = self.laid[source]
        if laid.node is None and laid.kind in ("route", "buffer"):
            return Laid(laid.kind, (False,) * len(shape(node)))
        if node.target in TRAILING:
            return self._trailing_op(node, laid)
        position, name, default = DIM_OF[node.target]
        given = argument(node, position, name, default)
        rank = len(laid.features)
        many = given if isinstance(given, (list, tuple)) else [given]
        dims = list(range(rank)) if given is None else [dim % rank for dim in many]
        if not any(laid.features[dim] for dim in dims):
            if node.target in _PICKS:
                dropped = node.target is aten.select.int
                left = [f for dim, f in enumerate(laid.features) if not (dropped and dim in dims)]
                return self.moved(node, laid, left)
            raise Refusal(f"{node.target} works across rows", node, 3)
        if not all(laid.features[dim] for dim in dims):
            raise Refusal(f"{node.target} works across rows and features", node, 3)
        places = [laid.at.index(dim) + 1 for dim in dims]
        args = list(node.args)
        kwargs = dict(node.kwargs)
        moved: Any = places if given is None or isinstance(given, (list, tuple)) else places[0]
        if len(args) > position:
            args[position] = moved
        else:
            kwargs[name] = moved
        args[0] = laid.node
        features = laid.features
        if node.target not in KEEPS_DIMS and not argument(node, 2, "keepdim", False):
            features = tuple(f for dim, f in enumerate(laid.features) if dim not in dims)
        if node.target is aten.select.int:
            features = tuple(f for dim, f in enumerate(laid.features) if dim not in dims)
        return Laid(laid.kind, features, self.call(node.target, *args, **kwargs), laid.met)

    def _trailing_op(self, node: Node, laid: Laid) -> Laid:
        sizes: Any = argument(node, TRAILING[node.target], "normalized_shape")
        if not all(laid.features[-len(sizes) :]):
            raise Refusal(f"{node.target} works across rows", node, 3)
        return Laid(laid.kind, laid.features, self._copied(node), laid.met)

    def _copied(self, node: Node) -> Node:
        def own(n: Node) -> Any:
            laid = self.laid.get(n)
            if laid is None or laid.kind == "constant":
                return self._operand(n, n.name)
            if laid.node is None:
                raise Refusal(f"{n} takes part in a way not known", node, 3)
            return laid.node

        return self.call(node.target, *map_arg(node.args, own), **map_arg(node.kwargs, own))

    def _concatenated(self, node: Node) -> Laid:
        parts: Any = node.args[0]
        if self._joins_experts(node):
            return self.moved(node, self.laid[parts[0]], self.laid[parts[0]].features)
        laid = [self.laid[n] for n in parts]
        first, dim = laid[0], argument(node, 1, "dim", 0) % len(shape(node))
        alike = all((p.kind, p.features) == (first.kind, first.features) for p in laid)
        if not alike or first.node is None or not first.features[dim]:
            raise Refusal("rows are concatenated", node, 3)
        joined = self.call(aten.cat.default, [p.node for p in laid], first.at.index(dim) + 1)
        return Laid(first.kind, first.features, joined, any(p.met for p in laid))


def _along_feature(layout: Layout, split: Node) -> bool:
    position, name, default = DIM_OF[split.target]
    source: Any = split.args[0]
    features = layout.laid[source].features
    return bool(features) and features[argument(split, position, name, default) % len(features)]


def trailing(laid: Laid, rank: int, node: Node | None = None) -> tuple[bool, ...]:
    """The features stay last, whatever became of the dims before them."""
    count = len(laid.at)
    if node is not None and any(laid.features[: len(laid.features) - count]):
        raise Refusal("rows are indexed with their features not last", node, 3)
    return (*[False] * (rank - count), *[True] * count)
