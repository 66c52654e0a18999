"""What makes a ``[E, ...]`` tensor a table of experts: the same on every rank, and multiplied.

Contract. ``check_tables`` raises `Refusal` unless every table a region reads is independent of the
region's tokens and selection, and at least one of them meets the rows in a matmul. On another rank
a table that depends on tokens would be made of that rank's tokens; a rewrite would read the wrong
one, and verification, which gives all ranks the same tables, could not tell. Entries that are only
added to rows (retrieved values, biases) are cheaper to look up than to exchange tokens for.

Pseudo-code::

    for table: refuse if it is made from the selection, or from the tokens (above parameters)
    refuse if no matmul is in the body
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch.fx import Node

from moe_fx.passes.gathers import gather_of
from moe_fx.passes.roles import VIEWS, Refusal, Role, is_grouped_matmul, is_unary_rowwise

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


def check_tables(
    tables: Iterable[Node], tokens: Node, body: Collection[Node], of: Mapping[Node, Role]
) -> None:
    """``tables``: the per-expert tensors of a region that dispatches ``tokens``; ``of``: what is
    known to come from its selection."""
    if not any(node.target in _MATMULS or is_grouped_matmul(node) for node in body):
        raise Refusal("the rows meet no expert's matrix", tokens, 4)
    for table in tables:
        origin = _origin(table)
        if origin is _view_root(tokens):
            raise Refusal(f"the per-expert table {table} holds the tokens", table, 4)
        above = _ancestors(origin)
        if any(node in of for node in above):
            raise Refusal(f"the per-expert table {table} depends on what was selected", table, 4)
        if origin.op == "call_function" and gather_of(origin) is None:
            shared = [n for n in _ancestors(tokens) & above if n.op == "placeholder"]
            if shared:
                raise Refusal(
                    f"the per-expert table {table} is computed from {shared[0]}, as the tokens are",
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


def _view_root(node: Node) -> Node:
    while node.target in VIEWS:
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node


def _ancestors(node: Node) -> set[Node]:
    found, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found
