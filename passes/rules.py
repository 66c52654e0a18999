"""The rules of inference: from the roles of a node's arguments to the role of the node.

Contract. ``Roles.infer(node)`` is called in topological order for nodes that read a node with a
role. A role is a proof: each rule checks everything that makes its conclusion true (direction and
dimension of a sort, which permutation an index undoes, that an op keeps each row to itself) and
raises `Refusal` with the reason otherwise.

Pseudo-code::

    role(top-k)  = PerToken
    role(node)   = first rule that applies(roles of the node's arguments)   or   Refusal(reason)

A row-wise op (pointwise, or working along other dims than the first) keeps ``Rows``; that is how
the experts' body stays unexamined. To teach the recogniser a spelling, add a rule here.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from moe_fx.passes.roles import (
    ELEMENTWISE_COPIES,
    VIEWS,
    Combined,
    Counts,
    Grouped,
    Order,
    PairIds,
    PairWeights,
    Permutation,
    PerToken,
    Refusal,
    Role,
    Rows,
    RowTable,
    Scratch,
    Selection,
    SortResult,
    Stage,
    TokenIndex,
    argument,
    dims_touched,
    is_grouped_matmul,
    is_integer,
    is_pointwise,
    is_unary_rowwise,
    same,
    shape,
    tensor_inputs,
    value,
)
from torch.fx import Node

from moe_fx.compat import statically_known_true

aten = torch.ops.aten


class Roles:
    """Roles of nodes relative to one selection. ``infer`` is called in topological order."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.of: dict[Node, Role] = {selection.node: PerToken()}
        self.tables: dict[Node, None] = {}
        self.dispatched: dict[Node, Node] = {}

    # -- helpers -------------------------------------------------------------------------------

    def get(self, node: Any) -> Role | None:
        if not isinstance(node, Node):
            return None
        return self.of.get(node) or self._expanded_tokens(node)

    def _leads(self, node: Any, size: Any) -> bool:
        dims = shape(node)
        return bool(dims) and same(dims[0], size)

    def _is_per_pair(self, node: Node) -> bool:
        dims = shape(node)
        sel = self.selection
        return len(dims) == 2 and same(dims[0], sel.num_tokens) and same(dims[1], sel.top_k)

    def is_table(self, node: Any) -> bool:
        """``[E, ...]``, and not computed from the selection."""
        return (
            isinstance(node, Node)
            and node not in self.of
            and len(shape(node)) >= 2
            and self._leads(node, self.selection.num_experts)
        )

    def _expanded_tokens(self, node: Node) -> Role | None:
        """Tokens repeated K times each (``repeat_interleave(x, K, 0)``): rows in pair order that
        no selected id was needed for."""
        if node.target is aten.repeat_interleave.self_int:
            tokens, repeats = node.args[0], node.args[1]
            dim = argument(node, 2, "dim")
            if (
                dim == 0
                and repeats == self.selection.top_k
                and isinstance(tokens, Node)
                and tokens not in self.of
                and self._leads(tokens, self.selection.num_tokens)
                and not is_integer(tokens)
            ):
                self.dispatched[node] = tokens
                self.of[node] = Rows("pair", "token")
                return self.of[node]
        elif node.op == "call_function" and is_unary_rowwise(node):
            source = node.args[0]
            role = self._expanded_tokens(source) if isinstance(source, Node) else None
            if role is not None:
                self.of[node] = role
                return role
        return None

    # -- the rules -----------------------------------------------------------------------------

    def infer(self, node: Node) -> Role:
        """The role of ``node``, one of whose arguments has a role; raises `Refusal`."""
        if node.op != "call_function":
            raise Refusal(f"{node.op} reads it", node)
        for rule in (
            self._tuple_item,
            self._sort,
            self._counts,
            self._inverse,
            self._index,
            self._token_index,
            self._flatten,
            self._matmul,
            self._group,
            self._combine,
            self._rowwise,
            self._per_token,
        ):
            role = rule(node)
            if role is not None:
                return role
        roles = sorted({type(r).__name__ for r in map(self.of.get, tensor_inputs(node)) if r})
        raise Refusal(
            f"no rule for {node.target} on {', '.join(roles)}", node, self._progress(node)
        )

    def _progress(self, node: Node) -> int:
        rank = {PerToken: 0, PairIds: 1, Counts: 1, SortResult: 1, Permutation: 1, PairWeights: 1}
        rank |= {TokenIndex: 2, RowTable: 3, Rows: 4, Grouped: 5}
        return max((rank.get(type(self.of.get(n)), 0) for n in node.all_input_nodes), default=0)

    def _refuse(self, node: Node, reason: str) -> Refusal:
        return Refusal(reason, node, self._progress(node))

    def _tuple_item(self, node: Node) -> Role | None:
        if node.target is not operator.getitem:
            return None
        role = self.get(node.args[0])
        if isinstance(role, SortResult):
            assert isinstance(node.args[0], Node)
            if node.args[1] == 0:
                return PairIds("sorted", role.source)
            return Permutation(role.source, node.args[0])
        if isinstance(role, (Rows, RowTable, Grouped, PerToken)):
            return role
        return None

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
        if node.target not in VIEWS and node.target is not aten.flatten.using_ints:
            return None
        source = node.args[0]
        role, dims = self.get(source), shape(node)
        if not isinstance(role, PerToken) or not isinstance(source, Node):
            return None
        flat = len(dims) == 1 or (len(dims) == 2 and same(dims[1], 1) and self.selection.top_k > 1)
        if self._is_per_pair(source) and flat and self._leads(node, self.selection.num_pairs):
            if is_integer(source):
                return PairIds("pair", source) if len(dims) == 1 else None
            return PairWeights("pair", source)
        return None

    def _matmul(self, node: Node) -> Role | None:
        if is_grouped_matmul(node):
            return self._grouped_matmul(node)
        if node.target is aten.bmm.default:
            return self._batched_matmul(node)
        if node.target in (aten.linear.default, aten.matmul.default, aten.mm.default):
            return self._shared_matmul(node)
        return None

    def _grouped_matmul(self, node: Node) -> Role | None:
        rows, table, offsets = self.get(node.args[0]), node.args[1], self.get(node.args[2])
        if not isinstance(rows, Rows):
            raise self._refuse(node, "the grouped matmul's rows are not the dispatched tokens")
        if rows.order != "sorted":
            raise self._refuse(node, "the grouped matmul's rows are not sorted by expert")
        if rows.stage == "post":
            raise self._refuse(node, "routing weights multiply the rows before an expert matmul")
        if not isinstance(offsets, Counts) or not offsets.offsets:
            raise self._refuse(
                node, "the grouped matmul's offsets are not the running sum of counts"
            )
        if not self.is_table(table) or len(shape(table)) != 3:
            raise self._refuse(node, "the grouped matmul's weight is not one matrix per expert")
        self.tables[table] = None  # type: ignore[index]
        return Rows("sorted", "expert")

    def _batched_matmul(self, node: Node) -> Role | None:
        left, right = self.get(node.args[0]), self.get(node.args[1])
        table_at = 0 if isinstance(left, RowTable) else 1
        table, rows = (left, right) if table_at == 0 else (right, left)
        if not isinstance(table, RowTable):
            if isinstance(left, (Rows, Grouped)) or isinstance(right, (Rows, Grouped)):
                raise self._refuse(node, "rows meet a matrix that is not their expert's")
            return None
        if not isinstance(rows, Rows):
            raise self._refuse(node, "expert weights meet something that is not the token rows")
        if rows.order != table.order:
            raise self._refuse(node, f"{table.order}-order weights meet {rows.order}-order rows")
        if rows.stage == "post":
            raise self._refuse(node, "routing weights multiply the rows before an expert matmul")
        vector_dim = 2 if table_at == 0 else 1
        if not same(shape(node.args[1 - table_at])[vector_dim], 1):
            raise self._refuse(node, "expert weights meet more than one vector per row")
        return Rows(rows.order, "expert")

    def _shared_matmul(self, node: Node) -> Role | None:
        rows, weight = self.get(node.args[0]), node.args[1]
        if not isinstance(rows, (Rows, PerToken)) or self.get(weight) is not None:
            return None
        if isinstance(rows, Rows) and len(shape(weight)) > 2:
            return None
        return rows

    def _group(self, node: Node) -> Role | None:
        """``[S, ...] -> [T, K, ...]``."""
        if node.target not in VIEWS and node.target is not aten.unflatten.int:
            return None
        role, dims = self.get(node.args[0]), shape(node)
        if not isinstance(role, Rows) or len(dims) != len(shape(node.args[0])) + 1:
            return None
        sel = self.selection
        if not (same(dims[0], sel.num_tokens) and same(dims[1], sel.top_k)):
            return None
        if role.order != "pair":
            raise self._refuse(node, "rows are grouped by token while still sorted by expert")
        return Grouped(role.stage)

    def _combine(self, node: Node) -> Role | None:
        role = self.get(node.args[0]) if node.args else None
        if not isinstance(role, Grouped) or node.target is not aten.sum.dim_IntList:
            return None
        dims = argument(node, 1, "dim")
        if [d % len(shape(node.args[0])) for d in dims] != [1] or argument(
            node, 2, "keepdim", False
        ):
            return None
        if role.stage == "token":
            raise self._refuse(node, "token rows are summed without having met an expert")
        return Combined()

    def _rowwise(self, node: Node) -> Role | None:
        """An op that keeps every row to itself keeps the role of its rows."""
        inputs = tensor_inputs(node)
        roles = {n: self.get(n) for n in inputs}
        found = [r for r in roles.values() if r is not None]
        if not found or not all(
            isinstance(r, (Rows, RowTable, PairWeights, PairIds, Grouped, PerToken)) for r in found
        ):
            return None
        if all(isinstance(r, PerToken) for r in found):
            return None
        if all(isinstance(r, PairIds) for r in found):
            return found[0] if node.target in ELEMENTWISE_COPIES else None
        grouped = any(isinstance(r, Grouped) for r in found)
        if not grouped and any(isinstance(r, (PairIds, PerToken)) for r in found):
            return None
        if grouped and not all(isinstance(r, (Grouped, PerToken)) for r in found):
            return None
        self._check_rows_stay_apart(node, roles, first_free_dim=2 if grouped else 1)
        stages: list[Stage] = [
            getattr(r, "stage", "expert" if isinstance(r, RowTable) else "post") for r in found
        ]
        stage: Stage = max(stages, key=("token", "expert", "post").index)
        if grouped:
            return Grouped(stage)
        orders = {r.order for r in found}  # type: ignore[attr-defined]
        if len(orders) != 1:
            raise self._refuse(node, "rows in pair order meet rows sorted by expert")
        first = found[0]
        if all(type(r) is type(first) for r in found) and isinstance(
            first, (PairWeights, RowTable)
        ):
            return first
        return Rows(orders.pop(), stage)

    def _check_rows_stay_apart(
        self, node: Node, roles: dict[Node, Role | None], first_free_dim: int
    ) -> None:
        dims = shape(node)
        if is_pointwise(node):
            for other, role in roles.items():
                theirs = shape(other)
                aligned = len(theirs) == len(dims) and all(
                    same(a, b) for a, b in zip(theirs[:first_free_dim], dims, strict=False)
                )
                lead = theirs[: max(0, first_free_dim - (len(dims) - len(theirs)))]
                constant = role is None and all(same(size, 1) for size in lead)
                if not (aligned and role is not None) and not constant:
                    raise self._refuse(node, f"{other} varies from row to row in a way not known")
            return
        if node.target in VIEWS or node.target is aten.flatten.using_ints:
            before = shape(node.args[0])
            if len(dims) >= first_free_dim and all(
                same(a, b) for a, b in zip(before[:first_free_dim], dims, strict=False)
            ):
                return
            raise self._refuse(node, f"the reshape to {list(dims)} mixes rows")
        touched = dims_touched(node)
        if touched is None:
            raise self._refuse(node, f"{node.target} is not known to keep rows apart")
        if any(dim < first_free_dim for dim in touched):
            raise self._refuse(node, f"{node.target} works across rows")
        if any(role is None for role in roles.values()) and node.target is aten.cat.default:
            raise self._refuse(node, "rows are concatenated with something that is not rows")

    def _per_token(self, node: Node) -> Role | None:
        """Anything ``[T, ...]`` made from per-token values: kept as captured, so not examined."""
        inputs = tensor_inputs(node)
        if not all(isinstance(self.get(n), (PerToken, type(None))) for n in inputs):
            return None
        val = value(node)
        if isinstance(val, (tuple, list)):
            return PerToken()
        if not self._leads(node, self.selection.num_tokens):
            return None
        per_token = 1
        for size in shape(node)[1:]:
            per_token *= size
        small = statically_known_true(
            per_token <= self.selection.num_experts * self.selection.top_k
        )
        return PerToken() if small else None
