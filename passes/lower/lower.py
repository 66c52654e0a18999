"""Lower: dialect ops -> ops of the device, in a graph whose gradients are there already.

Contract. In: a graph with dialect ops, every node with ``meta["val"]``, as compilers hand it to
their custom passes. Out: the same graph, in which each op that ``lowerings`` knows is replaced, and
each that can't be (a constraint of the device's op is violated) stays as it is, with its reason.

Pseudo-code::

    for each node with a lowering, in order:
        emit its replacement before it;  unmet -> take back what was emitted, note why
        getitem of it -> the parts of the replacement;  other users -> the replacement
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch.fx import Graph, Node

from moe_fx.compat import FakeValues
from moe_fx.passes.lower.emit import Emit, Unmet
from moe_fx.region import Lowered, source_of

E = TypeVar("E", bound=Emit)
Lowering = Callable[[E, Node], Any]
_NOT_THE_DEVICES = ("aten", "prims")


def lower(
    graph: Graph,
    emit: type[E],
    lowerings: Mapping[Any, Lowering[E]],
    patterns: Mapping[Callable[[Node], bool], Lowering[E]],
) -> list[Lowered]:
    """Lower ``graph`` in place; what was done. emit: what the lowerings write with. patterns: of
    nodes known by more than their op."""
    done: list[Lowered] = []
    values = FakeValues(graph)
    for node in list(graph.nodes):
        lowering = _lowering_of(node, lowerings, patterns)
        if lowering is not None:
            done.append(_lower(lowering, emit(graph, values, like=node)))
    graph.eliminate_dead_code()
    graph.lint()
    return done


def _lowering_of(
    node: Node,
    lowerings: Mapping[Any, Lowering[E]],
    patterns: Mapping[Callable[[Node], bool], Lowering[E]],
) -> Lowering[E] | None:
    if node.op != "call_function":
        return None
    if node.target in lowerings:
        return lowerings[node.target]
    return next((found for matches, found in patterns.items() if matches(node)), None)


def _lower(lowering: Lowering[E], emit: E) -> Lowered:
    node = emit.like
    name, source = str(node.target).removesuffix(".default"), source_of(node)
    with node.graph.inserting_before(node):
        try:
            result = lowering(emit, node)
        except Unmet as unmet:
            emit.undo()
            return Lowered(name, (), node.name, source, str(unmet))
    _replace(node, result)
    return Lowered(name, tuple(_ops(emit.added)), node.name, source)


def _replace(node: Node, result: Any) -> None:
    """result: a node; or a tuple, of which a part may be a list, as the op returns."""
    if isinstance(result, Node):
        node.replace_all_uses_with(result, propagate_meta=False)
    else:
        for user in list(node.users):
            assert user.target is operator.getitem
            _replace(user, result[user.args[1]])
    node.graph.erase_node(node)


def _ops(added: list[Node]) -> list[str]:
    """Those of the device and of the dialect."""
    return [
        str(node.target).removesuffix(".default")
        for node in added
        if getattr(node.target, "namespace", "aten") not in _NOT_THE_DEVICES
    ]
