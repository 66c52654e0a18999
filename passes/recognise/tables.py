"""What makes a ``[E, ...]`` tensor a table of experts: the same on every rank, and multiplied.

Contract. ``check_tables`` raises `Refusal` unless every table a region reads is independent of the
region's tokens and selection, and at least one of them meets the rows in a matmul. On another rank
a table that depends on tokens would be made of that rank's tokens; a rewrite would read the wrong
one, and verification, which gives all ranks the same tables, could not tell. Entries that are only
added to rows (retrieved values, biases) are cheaper to look up than to exchange tokens for.

Pseudo-code::

    for table: refuse if it is made from the selection, from the tokens (above parameters), by
        chance, or from parameters and another input, which may differ between ranks
    refuse if no matmul is in the body
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch.fx import Node

from moe_fx.graph.flow import closure
from moe_fx.graph.gathers import gather_of
from moe_fx.graph.names import view_root
from moe_fx.graph.nodes import is_grouped_matmul, is_random, is_unary_rowwise, shape
from moe_fx.graph.parameters import is_for_experts, is_noted, is_tensor
from moe_fx.graph.refusal import Refusal
from moe_fx.passes.roles import Role

aten = torch.ops.aten

_MATMULS = (
    aten.bmm.default,
    aten.baddbmm.default,
    aten.matmul.default,
    aten.einsum.default,
    aten.linear.default,
    aten.mm.default,
    aten.addmm.default,
)


def is_matmul(node: Node) -> bool:
    """A matmul that experts' rows can meet their matrices in."""
    return node.target in _MATMULS or is_grouped_matmul(node)


def weight_tables(body: Iterable[Node]) -> list[Node]:
    """Stacked weights ``[experts, ., .]`` (parameters, or gathered shards of them, in any layout)
    that matmuls of ``body`` read."""
    sources = (source for node in filter(is_matmul, body) for source in node.all_input_nodes)
    stacked = dict.fromkeys(source for source in sources if len(shape(source)) == 3)
    return [table for table in stacked if _is_weight(_origin(table))]


def _is_weight(origin: Node) -> bool:
    return origin.op in ("placeholder", "get_attr") or gather_of(origin) is not None


def check_tables(
    tables: Iterable[Node],
    tokens: Node,
    body: Collection[Node],
    of: Mapping[Node, Role],
    experts: int,
) -> None:
    """``tables``: the per-expert tensors of a region that dispatches ``tokens``; ``of``: what is
    known to come from its selection."""
    if not any(map(is_matmul, body)):
        raise Refusal("the rows meet no expert's matrix", tokens, 4)
    for table in tables:
        if _origin(table) is view_root(tokens):
            raise Refusal(f"the per-expert table {table} holds the tokens", table, 4)
        above = _ancestors(table)
        if any(node in of for node in above):
            raise Refusal(f"the per-expert table {table} depends on what was selected", table, 4)
        chance = next(filter(is_random, sorted(above)), None)
        if chance is not None:
            reason = f"the per-expert table {table} is made by chance ({chance.target})"
            raise Refusal(reason, chance, 4)
        if len(above) > 1:
            _check_inputs(table, above, tokens, experts)


def _check_inputs(table: Node, above: set[Node], tokens: Node, experts: int) -> None:
    lead = shape(tokens)[:-1]
    inputs = [n for n in sorted(above) if n.op == "placeholder" and is_tensor(n)]
    others = [n for n in inputs if not is_noted(n) and not is_for_experts(n, experts, lead)]
    shared = [n for n in others if n in _ancestors(tokens)]
    if shared:
        raise Refusal(
            f"the per-expert table {table} is computed from {shared[0]}, as the tokens are",
            table,
            4,
        )
    if others and any(map(is_noted, inputs)):
        raise Refusal(
            f"the per-expert table {table} is computed from {others[0]}, an input that other "
            "ranks may have otherwise",
            table,
            4,
        )


def _origin(table: Node) -> Node:
    """The parameter, gather or computation that ``table`` is a view, cast or transpose of."""
    node = table
    while node.op == "call_function" and gather_of(node) is None and is_unary_rowwise(node):
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node


def _ancestors(node: Node) -> set[Node]:
    """All that ``node`` is computed from, down to gathered shards."""
    return closure([node], lambda n: [] if gather_of(n) is not None else n.all_input_nodes)
