"""What can be done to one node of a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

Change = Callable[[Graph, Node], None]


@dataclass(frozen=True)
class Mutation:
    """``change`` is made to the node called ``node``. kind: what mistake it is."""

    node: str
    label: str
    change: Change
    kind: str = "other"

    def __str__(self) -> str:
        return f"{self.node}: {self.label}"


def named(graph: Graph, name: str) -> Node:
    return next(node for node in graph.nodes if node.name == name)


def _in(graph: Graph, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``args`` of a node of the original graph, for one of its copy."""
    return map_arg(args, lambda node: named(graph, node.name))  # type: ignore[return-value]


def with_args(*args: Any, target: Any = None, **kwargs: Any) -> Change:
    def change(graph: Graph, node: Node) -> None:
        node.target = node.target if target is None else target
        node.args, node.kwargs = _in(graph, args), kwargs

    return change


def with_argument(position: int, value: Any) -> Change:
    """Other arguments stay; those before it that were left out get their defaults."""

    def change(graph: Graph, node: Node) -> None:
        missing = node.target._schema.arguments[len(node.args) : position]  # type: ignore[union-attr]
        args = [*node.args, *(argument.default_value for argument in missing)]
        node.args = (*args[:position], value, *args[position + 1 :])

    return change


def with_keyword(name: str, value: Any) -> Change:
    def change(graph: Graph, node: Node) -> None:
        node.kwargs = {**node.kwargs, name: value}

    return change


def with_target(target: Any) -> Change:
    def change(graph: Graph, node: Node) -> None:
        node.target = target

    return change


def with_inputs_swapped(graph: Graph, node: Node) -> None:
    node.args = (node.args[1], node.args[0], *node.args[2:])


def replaced_by(other: str) -> Change:
    """Its users read an earlier node instead."""

    def change(graph: Graph, node: Node) -> None:
        node.replace_all_uses_with(named(graph, other))

    return change


def exchanged_with(other: str) -> Change:
    """Each of two nodes of one op takes the arguments of the other, but for the first."""

    def change(graph: Graph, node: Node) -> None:
        sibling = named(graph, other)
        (first, *mine), (other_first, *its) = node.args, sibling.args
        node.args, sibling.args = (first, *its), (other_first, *mine)

    return change


def together(*changes: tuple[str, Change]) -> Change:
    """Several nodes are changed, each given by its name."""

    def change(graph: Graph, _node: Node) -> None:
        for name, each in changes:
            each(graph, named(graph, name))

    return change


def without(graph: Graph, node: Node) -> None:
    """Its users read its first input instead."""
    source = node.args[0]
    assert isinstance(source, Node)
    node.replace_all_uses_with(source)


def followed_by(*ops: tuple[Any, ...]) -> Change:
    """Its users read ``op(node, *args)`` instead, or of several ops one after the other."""

    def change(graph: Graph, node: Node) -> None:
        users = list(node.users)
        result, after = node, node
        for op, *args in ops:
            with graph.inserting_after(after):
                result = graph.call_function(op, (result, *_in(graph, tuple(args))))
            after = result
        for user in users:
            user.replace_input_with(node, result)

    return change


def followed_by_input(op: Any, *args: Any) -> Change:
    """The first input passes through ``op`` first."""

    def change(graph: Graph, node: Node) -> None:
        with graph.inserting_before(node):
            first = graph.call_function(op, (node.args[0], *args))
        node.args = (first, *node.args[1:])

    return change


def reading(other: str, source: str) -> Change:
    """Reads another node in the place of an input."""

    def change(graph: Graph, node: Node) -> None:
        node.replace_input_with(named(graph, source), named(graph, other))

    return change
