"""Rules for how tokens reach experts: sort, permute, count, index, flatten."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from moe_fx.graph.nodes import (
    ELEMENTWISE_COPIES,
    FRESH_BUFFERS,
    VIEWS,
    argument,
    is_integer,
    same,
    shape,
)
from moe_fx.passes.recognise.by_rule.role_map import RoleMap
from moe_fx.passes.roles import (
    Counts,
    Order,
    PairIds,
    PairWeights,
    Permutation,
    PerToken,
    Role,
    Rows,
    RowTable,
    Scratch,
    SortResult,
    TokenIndex,
)

aten = torch.ops.aten


class DispatchRules(RoleMap):
    """See `rules.py` for the contract of a rule."""

    def _sort(self, node: Node) -> Role | None:
        if node.target not in (
            aten.sort.default,
            aten.sort.stable,
            aten.argsort.default,
            aten.argsort.stable,
        ):
            return None
        role = self.get(node.args[0])
        names = node.target._schema.arguments
        given = {a.name: v for a, v in zip(names, node.args, strict=False)} | node.kwargs
        if isinstance(role, Permutation) and not role.inverse and "argsort" in str(node.target):
            if given.get("descending"):
                raise self._refuse(node, "the permutation is inverted by a descending argsort")
            return replace(role, inverse=True)
        if not isinstance(role, PairIds):
            return None
        if role.order != "pair":
            raise self._refuse(node, "expert ids that are sorted already are sorted again")
        if given.get("descending"):
            raise self._refuse(node, "rows are sorted by descending expert id")
        if "argsort" in str(node.target):
            return Permutation(role.source, node)
        return SortResult(role.source)

    def _counts(self, node: Node) -> Role | None:
        role = self.get(node.args[0]) if node.args else None
        experts = self.selection.num_experts
        if node.target is aten.histc.default and isinstance(role, PairIds):
            bins, low, high = (
                argument(node, at, n, 0) for at, n in enumerate(("bins", "min", "max"), 1)
            )
            if bins != experts or low != 0 or high not in (experts - 1, experts):
                raise self._refuse(
                    node,
                    f"tokens per expert are counted in {bins} bins from {low} to {high}, "
                    f"but the selection is over {experts} experts",
                )
            return Counts(role.source)
        if node.target is aten.bincount.default and isinstance(role, PairIds):
            if argument(node, 1, "weights") is not None:
                raise self._refuse(node, "the count of tokens per expert is weighted")
            if argument(node, 2, "minlength", 0) != experts:
                raise self._refuse(node, f"bincount does not have minlength {experts}")
            return Counts(role.source)
        if isinstance(role, Counts):
            if node.target is aten.cumsum.default:
                if role.offsets:
                    raise self._refuse(node, "offsets are summed twice")
                return replace(role, offsets=True)
            if node.target in ELEMENTWISE_COPIES:
                return role
        return None

    def _inverse(self, node: Node) -> Role | None:
        """``empty.index_put([perm], arange(S))`` or ``scatter``: the inverse of ``perm``."""
        if node.target in (aten.empty_like.default, aten.zeros_like.default):
            return Scratch() if isinstance(self.get(node.args[0]), Permutation) else None
        if node.target is aten.index_put.default:
            indices, values = node.args[1], node.args[2]
            if argument(node, 3, "accumulate", False) or len(indices) != 1:  # type: ignore[arg-type]
                return None
            index = indices[0]  # type: ignore[index]
        elif node.target is aten.scatter.src and argument(node, 1, "dim") in (0, -1):
            index, values = node.args[2], node.args[3]
        else:
            return None
        role = self.get(index)
        if not isinstance(role, Permutation):
            return None
        if not self._is_arange(values):
            raise self._refuse(node, "the permutation is scattered with values other than 0 … S-1")
        if len(shape(node)) != 1 or not self._leads(node, self.selection.num_pairs):
            raise self._refuse(node, "the inverse permutation does not have one entry per row")
        buffer = node.args[0]
        if isinstance(buffer, Node) and buffer not in self.of and buffer.target in FRESH_BUFFERS:
            self.of[buffer] = Scratch()
        self.of[values] = Scratch()  # type: ignore[index]
        while isinstance(values, Node) and values.target in VIEWS:
            values = values.args[0]
            self.of[values] = Scratch()  # type: ignore[index]
        return replace(role, inverse=not role.inverse)

    def _is_arange(self, node: Any) -> bool:
        if same(self.selection.num_pairs, 1) and isinstance(node, Node) and node.target in VIEWS:
            node = node.args[0]  # one row: 0 is written as a scalar
        if not isinstance(node, Node) or not self._leads(node, self.selection.num_pairs):
            return False
        if node.target is aten.arange.default:
            return True
        if node.target is aten.arange.start:
            return bool(argument(node, 0, "start") == 0)
        from_zero = argument(node, 0, "start") == 0 and argument(node, 2, "step", 1) == 1
        return node.target is aten.arange.start_step and bool(from_zero)

    def _index(self, node: Node) -> Role | None:
        if node.target is aten.index.Tensor:
            source, indices = node.args[0], node.args[1]
            if len(indices) != 1:  # type: ignore[arg-type]
                return None
            index = indices[0]  # type: ignore[index]
        elif node.target is aten.index_select.default and argument(node, 1, "dim") == 0:
            source, index = node.args[0], node.args[2]
        elif node.target is aten.embedding.default:
            source, index = node.args[0], node.args[1]
        else:
            return None
        at, what = self.get(index), self.get(source)
        if isinstance(at, PairIds):
            if self.is_table(source):
                assert isinstance(source, Node)
                self.tables[source] = None
                return RowTable(at.order)
            raise self._refuse(
                node,
                f"expert ids select from {source}, whose first dim does not count the "
                f"{self.selection.num_experts} experts",
            )
        if isinstance(at, TokenIndex):
            if what is not None or not self._leads(source, self.selection.num_tokens):
                raise self._refuse(
                    node, f"token indices select from {source}, which is no token tensor"
                )
            assert isinstance(source, Node)
            self.dispatched[node] = source
            return Rows(at.order, "token")
        if isinstance(at, Permutation):
            before: Order = "sorted" if at.inverse else "pair"
            after: Order = "pair" if at.inverse else "sorted"
            if isinstance(what, (Rows, PairWeights, PairIds)):
                if what.order != before:
                    raise self._refuse(
                        node, f"rows in {what.order} order are permuted from {before} order"
                    )
                return replace(what, order=after)
            if isinstance(what, TokenIndex) and what.order == before:
                return TokenIndex(after)
        return None

    def _token_index(self, node: Node) -> Role | None:
        """``perm // K``: the token of each sorted row."""
        if node.target is aten.div.Tensor_mode:
            if node.kwargs.get("rounding_mode") != "floor":
                return None
        elif node.target is not aten.floor_divide.default:
            return None
        role = self.get(node.args[0])
        if not isinstance(role, Permutation):
            return None
        if role.inverse or node.args[1] != self.selection.top_k:
            raise self._refuse(
                node,
                f"token of a row is taken as {node.args[0]} // {node.args[1]}, expected the sort's "
                f"permutation // {self.selection.top_k}",
            )
        return TokenIndex("sorted")

    def _flatten(self, node: Node) -> Role | None:
        """``[T, K] -> [S]``: from the router's domain to pairs."""
        if node.target not in (*VIEWS, aten.flatten.using_ints, aten.squeeze.dim):
            return None
        source = node.args[0]
        role, dims = self.get(source), shape(node)
        if not isinstance(role, PerToken) or not isinstance(source, Node):
            return None
        flat = len(dims) == 1 or (len(dims) == 2 and same(dims[1], 1) and self.selection.top_k > 1)
        if self._is_per_pair(source) and flat and self._leads(node, self.selection.num_pairs):
            if is_integer(source) and len(dims) != 1:
                return None
            matrix = self._matrix(source, node)
            return (PairIds if is_integer(source) else PairWeights)("pair", matrix)
        return None

    def _matrix(self, source: Node, reader: Node) -> Node:
        """``source`` as ``[T, K]``: where it has other dims, a view put between it and ``reader``
        (in the graph; it changes no value)."""
        if len(shape(source)) == 2 and self._leads(source, self.selection.num_tokens):
            return source
        sizes = [-1, self.selection.top_k]
        with source.graph.inserting_before(reader):
            matrix = source.graph.call_function(aten.view.default, (source, sizes))
        matrix.meta = {**source.meta, "val": source.meta["val"].reshape(sizes)}
        reader.replace_input_with(source, matrix)
        self.of[matrix] = PerToken()
        return matrix

    def _unflatten(self, node: Node) -> Role | None:
        """``[S] -> [T, K]``: expert ids back in the router's domain; or ``[S]`` as it is."""
        if node.target not in (*VIEWS, aten.unsqueeze.default, aten.unflatten.int):
            return None
        role = self.get(node.args[0])
        if not isinstance(role, PairIds):
            return None
        if len(shape(node)) == 1:
            return role
        return PerToken() if role.order == "pair" and self._is_per_pair(node) else None
