"""The rules of inference: from the roles of a node's arguments to the role of the node.

Contract. ``Roles.infer(node)`` is called in topological order for nodes that read a node with a
role. A role is a proof: each rule checks everything that makes its conclusion true (direction and
dimension of a sort, which permutation an index undoes, that an op keeps each row to itself) and
raises `Refusal` with the reason otherwise.

Pseudo-code::

    role(selector) = PerToken
    role(node)   = first rule that applies(roles of the node's arguments)   or   Refusal(reason)

A row-wise op (pointwise, or working along other dims than the first) keeps ``Rows``; that is how
the experts' body stays unexamined. To teach the recogniser a spelling, add a rule here.
"""

from __future__ import annotations

import operator

from torch.fx import Node

from moe_fx.compat import statically_known_true
from moe_fx.graph.nodes import is_random, shape, tensor_inputs, value
from moe_fx.graph.refusal import ByChance, Refusal
from moe_fx.passes.recognise.by_rule.dispatch_rules import DispatchRules
from moe_fx.passes.recognise.by_rule.row_rules import RowRules
from moe_fx.passes.roles import (
    Grouped,
    PairIds,
    Permutation,
    PerToken,
    Role,
    Rows,
    RowTable,
    SortResult,
)


class Roles(DispatchRules, RowRules):
    """Roles of nodes relative to one selection. ``infer`` is called in topological order."""

    def infer(self, node: Node) -> Role:
        """The role of ``node``, one of whose arguments has a role; raises `Refusal`."""
        if node.op != "call_function":
            raise Refusal(f"{node.op} reads it", node)
        if is_random(node) and any(map(self._is_of_rows, tensor_inputs(node))):
            raise ByChance(node)
        for rule in (
            self._tuple_item,
            self._sort,
            self._counts,
            self._inverse,
            self._index,
            self._token_index,
            self._flatten,
            self._unflatten,
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
            f"no rule for {node.target} on {', '.join(roles)}",
            node,
            self._progress(node),
            unknown=True,
        )

    def _is_of_rows(self, node: Node) -> bool:
        return isinstance(self.get(node), (Rows, RowTable, Grouped))

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

    def _per_token(self, node: Node) -> Role | None:
        """Anything ``[T, ...]`` made from per-token values: kept as captured, so not examined."""
        inputs = tensor_inputs(node)
        if not all(isinstance(self.get(n), (PerToken, type(None))) for n in inputs):
            return None
        val = value(node)
        if isinstance(val, (tuple, list)):
            return PerToken()
        token_dims = self._token_dims(node)
        if not token_dims:
            return None
        per_token = 1
        for size in shape(node)[token_dims:]:
            per_token *= size
        small = statically_known_true(
            per_token <= self.selection.num_experts * self.selection.top_k
        )
        return PerToken() if small else None
