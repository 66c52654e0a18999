"""Rules for rows on their way: expert matmuls, row-wise ops, grouping by token, the sum."""

from __future__ import annotations

import torch
from torch.fx import Node

from moe_fx.graph.nodes import (
    ELEMENTWISE_COPIES,
    VIEWS,
    argument,
    dims_touched,
    is_grouped_matmul,
    is_pointwise,
    random_above,
    same,
    shape,
    tensor_inputs,
)
from moe_fx.graph.refusal import ByChance
from moe_fx.passes.recognise.by_rule.role_map import RoleMap
from moe_fx.passes.roles import (
    Combined,
    Counts,
    Grouped,
    PairIds,
    PairWeights,
    PerToken,
    Role,
    Rows,
    RowTable,
    Stage,
)

aten = torch.ops.aten


class RowRules(RoleMap):
    """See `rules.py` for the contract of a rule."""

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
                    chance = random_above(other) if role is None else None
                    if chance is not None:
                        raise ByChance(chance)
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
