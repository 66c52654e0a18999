"""Which node has which role, relative to one selection; what the rules share."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from moe_fx.graph.nodes import argument, is_integer, is_unary_rowwise, same, shape
from moe_fx.graph.refusal import Refusal
from moe_fx.passes.roles import (
    Counts,
    Grouped,
    PairIds,
    PairWeights,
    Permutation,
    PerToken,
    Role,
    Rows,
    RowTable,
    Selection,
    SortResult,
    TokenIndex,
)

aten = torch.ops.aten


class RoleMap:
    """What each node means so far; the tables and dispatched tokens met on the way."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.of: dict[Node, Role] = {node: PerToken() for node in selection.selectors}
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

    def _token_dims(self, node: Any) -> int:
        """How many leading dims of ``node`` count tokens: 1, or 2 for ``[B, S, ...]``; 0: none."""
        if self._leads(node, self.selection.num_tokens):
            return 1
        dims, lead = shape(node), self.selection.lead
        if len(dims) < len(lead) or not all(map(same, dims, lead)):
            return 0
        return len(lead)

    def _is_per_pair(self, node: Node) -> bool:
        """``[T, K]`` or ``[B, S, K]``; ``[T]`` or ``[B, S]`` if K = 1."""
        tail = shape(node)[self._token_dims(node) :]
        if not self._token_dims(node):
            return False
        top_k = self.selection.top_k
        return (len(tail) == 1 and same(tail[0], top_k)) or (not tail and top_k == 1)

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

    def _progress(self, node: Node) -> int:
        rank = {PerToken: 0, PairIds: 1, Counts: 1, SortResult: 1, Permutation: 1, PairWeights: 1}
        rank |= {TokenIndex: 2, RowTable: 3, Rows: 4, Grouped: 5}
        return max((rank.get(type(self.of.get(n)), 0) for n in node.all_input_nodes), default=0)

    def _refuse(self, node: Node, reason: str) -> Refusal:
        return Refusal(reason, node, self._progress(node))
