"""Bodies of activation checkpoints, opened for the passes and closed again for the base compiler.

Dynamo makes ``torch.utils.checkpoint.checkpoint``, of either kind, a higher-order op whose body is
a graph of its own. `open_bodies` puts the body's nodes in the op's place, each with a note of where
it belongs; the passes see one graph. `close_bodies` makes bodies of what they leave. So whatever
compiles the result does with a checkpoint what it always does, and it is the rewritten layer that
is computed again in backward (`moe_fx.capture.recompute`).

A node that a pass has added belongs where all its users are, or where a node that it reads and a
node that reads it both are, so that a body neither reads nor is read by what it waits for.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from moe_fx.capture.recompute import given_contexts, keep_routing, remember
from moe_fx.graph.nodes import value

__all__ = ["Body", "Path", "close_bodies", "note_outside", "open_bodies", "path_of"]

Path = tuple[int, ...]
"""Where a node belongs: numbers of bodies, the outermost first; () outside of all."""

_NOTE = "moe_fx_body"
_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_numbers = itertools.count()


@dataclass(frozen=True)
class Body:
    """A checkpoint that was opened. options: keyword arguments of the op; contexts: its
    ``context_fn``; meta: of the op's node."""

    options: dict[str, Any]
    contexts: Callable[[], Any] | None
    meta: dict[str, Any]


def open_bodies(module: GraphModule) -> tuple[GraphModule, dict[Path, Body]]:
    """(copy of Dynamo's graph with the nodes of each checkpoint's body in the op's place, what was
    opened); the graph itself if there is nothing to open."""
    if not any(_opens(node) for node in module.graph.nodes):
        return module, {}
    opener = _Opener()
    results = opener.inline(module, {}, ())
    opener.graph.output(results)
    opened = GraphModule(opener.attributes, opener.graph)
    opened.graph.lint()
    return opened, opener.bodies


def path_of(node: Node) -> Path:
    return (node.meta.get("custom") or {}).get(_NOTE, ())


def note_outside(module: GraphModule) -> None:
    """Note of every op that belongs to no body that it does not: the passes add others. Nothing to
    note where there are no bodies."""
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    if any(map(_is_noted, calls)):
        for node in calls:
            if not _is_noted(node):
                _note(node, ())


def close_bodies(
    module: GraphModule, bodies: Mapping[Path, Body], selections: Iterable[Node]
) -> list[GraphModule]:
    """Make bodies of the nodes that belong to them, in place. selections: the ids of experts that
    the graph exchanges tokens by. Returns the graphs that there are now."""
    present = set(module.graph.nodes)
    for ids in dict.fromkeys(selections):
        if ids in present and path_of(ids):
            remember(ids)
    paths = _settled(module.graph)
    for path in sorted(bodies, key=lambda path: (-len(path), path)):
        members = [node for node in module.graph.nodes if paths.get(node) == path]
        if members:
            paths.update(dict.fromkeys(_close(module, path, bodies[path], members), path[:-1]))
    module.graph.lint()
    module.recompile()
    return [part for part in module.modules() if isinstance(part, GraphModule)]


class _Opener:
    """graph: what becomes of a module's; attributes: what its ``get_attr`` nodes name."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.attributes: dict[str, Any] = {}
        self.bodies: dict[Path, Body] = {}

    def inline(self, module: GraphModule, values: dict[Node, Any], path: Path) -> Any:
        """Copy the nodes of ``module``; those in ``values`` stand for others. What it returns."""
        for node in module.graph.nodes:
            if node.op == "output":
                return map_arg(node.args[0], values.__getitem__)
            if node in values or _names_a_body(node):
                continue
            if _opens(node):
                self._open(module, node, values, path)
            else:
                values[node] = self._copy(module, node, values, path)
        raise AssertionError("a graph without output")

    def _open(self, module: GraphModule, node: Node, values: dict[Node, Any], path: Path) -> None:
        body = _body(node, module)
        own = (*path, next(_numbers))
        self.bodies[own] = Body(dict(node.kwargs), given_contexts(body), dict(node.meta))
        inputs = body.graph.find_nodes(op="placeholder")
        given = map_arg(node.args[1:], values.__getitem__)
        results = self.inline(body, dict(zip(inputs, given, strict=True)), own)
        for user in node.users:
            values[user] = results[user.args[1]]

    def _copy(self, module: GraphModule, node: Node, values: dict[Node, Any], path: Path) -> Node:
        copy = self.graph.node_copy(node, values.__getitem__)
        if node.op in ("get_attr", "call_module"):
            name = str(node.target)
            if path:
                copy.target = name = f"body_{path[-1]}_{name.replace('.', '_')}"
            self.attributes[name] = operator.attrgetter(str(node.target))(module)
        if path and node.op != "get_attr":
            _note(copy, path)
        return copy


def _opens(node: Node) -> bool:
    return (
        node.target is _CHECKPOINT
        and not any(isinstance(option, Node) for option in node.kwargs.values())
        and all(user.target is operator.getitem for user in node.users)
    )


def _names_a_body(node: Node) -> bool:
    return node.op == "get_attr" and any(_opens(u) and u.args[0] is node for u in node.users)


def _body(node: Node, module: GraphModule) -> GraphModule:
    name = node.args[0]
    assert isinstance(name, Node)
    body = module.get_submodule(str(name.target))
    assert isinstance(body, GraphModule)
    return body


def _is_noted(node: Node) -> bool:
    return _NOTE in (node.meta.get("custom") or {})


def _note(node: Node, path: Path) -> None:
    node.meta["custom"] = {**(node.meta.get("custom") or {}), _NOTE: path}


def _settled(graph: Graph) -> dict[Node, Path]:
    """Where each node that computes something belongs."""
    above: dict[Node, set[Path]] = {}
    for node in graph.nodes:
        above[node] = {path for n in node.all_input_nodes for path in above[n]}
        if node.op == "call_function":
            above[node] |= _prefixes(path_of(node))
    below: dict[Node, set[Path]] = {}
    paths: dict[Node, Path] = {}
    for node in reversed(graph.nodes):
        if node.op not in ("call_function", "call_module", "get_attr"):
            below[node] = set()
            continue
        below[node] = {path for user in node.users for path in below[user]}
        if _is_noted(node):
            path = path_of(node)
        else:
            path = _common([paths.get(user, ()) for user in node.users])
        around = above[node] & below[node]
        paths[node] = max([path, *around], key=len)
        below[node] |= _prefixes(paths[node])
    for node in graph.nodes:
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, Node) and not isinstance(value(source), Tensor) and source in paths:
            paths[node] = paths[source]
    return paths


def _prefixes(path: Path) -> set[Path]:
    return {path[:end] for end in range(1, len(path) + 1)}


def _common(paths: Sequence[Path]) -> Path:
    if not paths:
        return ()
    ends = itertools.takewhile(lambda numbers: len(set(numbers)) == 1, zip(*paths, strict=False))
    return tuple(numbers[0] for numbers in ends)


def _close(module: GraphModule, path: Path, body: Body, members: list[Node]) -> list[Node]:
    """The nodes that stand for ``members``, which are gone."""
    graph, first, inside = module.graph, members[0], set(members)
    _bring_forward(graph, members, inside)
    inputs = dict.fromkeys(n for node in members for n in node.all_input_nodes if n not in inside)
    results = [node for node in members if any(user not in inside for user in node.users)]
    inner = Graph()
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = inner.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in members:
        copies[node] = inner.node_copy(node, copies.__getitem__)
    inner.output(tuple(copies[node] for node in results))
    closed = GraphModule(module, inner)
    keep_routing(closed, body.contexts)
    name = "checkpoint_" + "_".join(map(str, path))
    module.add_submodule(name, closed)
    with graph.inserting_before(first):
        attribute = graph.get_attr(name)
        call = graph.call_function(_CHECKPOINT, (attribute, *inputs), body.options)
        call.meta = {**body.meta, "val": tuple(value(node) for node in results)}
        added = [attribute, call]
        for at, node in enumerate(results):
            assert isinstance(value(node), (Tensor, SymInt, int)), f"{node} cannot leave a body"
            result = graph.call_function(operator.getitem, (call, at))
            result.meta = dict(node.meta)
            node.replace_all_uses_with(
                result, delete_user_cb=lambda user: user not in inside, propagate_meta=False
            )
            added.append(result)
    for node in reversed(members):
        graph.erase_node(node)
    return added


def _bring_forward(graph: Graph, members: list[Node], inside: set[Node]) -> None:
    """Put all that ``members`` need before the first of them."""
    needed: set[Node] = set()
    stack = [source for node in members for source in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in needed and node not in inside:
            needed.add(node)
            stack.extend(node.all_input_nodes)
            assert inside.isdisjoint(node.all_input_nodes), f"{node} belongs inside of a checkpoint"
    first, order = members[0], list(graph.nodes)
    for node in order[order.index(first) :]:
        if node in needed:
            first.prepend(node)
