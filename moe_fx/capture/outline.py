"""Outline function transforms: what runs under ``torch.vmap`` becomes a submodule of its own.

Dynamo inlines ``vmap`` as calls that enter a level, wrap tensors for it and leave it again (the
masks of some attention layers in transformers, `associative_scan` in Jamba). Pre-dispatch tracing
of torch 2.13 knows no such levels, and no node may move into or out of one. `moe_fx.capture.opaque`
carries the submodules through the trace unopened.
"""

from __future__ import annotations

import copy
import operator

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

__all__ = ["enters_a_level", "is_outlined", "outline"]

_PREFIX = "transformed_"


def enters_a_level(node: Node) -> bool:
    return _name(node).endswith("_increment_nesting")


def is_outlined(node: Node) -> bool:
    """Whether `outline` made this node."""
    return node.op == "call_module" and str(node.target).startswith(_PREFIX)


def outline(module: GraphModule) -> GraphModule:
    """A copy of Dynamo's graph in which each outermost level is one ``call_module`` node, whose
    ``example_value`` is a tuple of tensors; the graph itself if there is none.

    A level stays as it is if it changes in place what it has not made, or if anything but tensors
    comes out.
    """
    if not any(enters_a_level(node) for node in module.graph.nodes):
        return module
    module = GraphModule(module, copy.deepcopy(module.graph))
    for at, level in enumerate(_levels(module.graph)):
        results = [node for node in level if any(user not in level for user in node.users)]
        if not any(_changes_others(node, level) for node in level) and all(
            map(_is_tensor, results)
        ):
            _replace(module, level, results, f"{_PREFIX}{at}")
    module.recompile()
    return module


def _levels(graph: Graph) -> list[dict[Node, None]]:
    """The nodes of each outermost level, in order, its entry and exit included."""
    levels: list[dict[Node, None]] = []
    depth = 0
    for node in graph.nodes:
        if enters_a_level(node):
            if depth == 0:
                levels.append({})
            depth += 1
        if depth:
            levels[-1][node] = None
        if _name(node).endswith("_decrement_nesting"):
            depth -= 1
    return levels


def _replace(module: GraphModule, level: dict[Node, None], results: list[Node], name: str) -> None:
    inputs = {source: None for node in level for source in node.all_input_nodes}
    inputs = {source: None for source in inputs if source not in level}
    inner = Graph()
    copied = {source: inner.placeholder(source.name) for source in inputs}
    for node in level:
        copied[node] = inner.node_copy(node, copied.__getitem__)
    inner.output(tuple(copied[node] for node in results))
    module.add_submodule(name, GraphModule(module, inner))
    with module.graph.inserting_before(next(iter(level))):
        call = module.graph.call_module(name, tuple(inputs))
    call.meta = dict((results or list(level))[0].meta)
    call.meta["example_value"] = tuple(node.meta["example_value"] for node in results)
    for at, node in enumerate(results):
        with module.graph.inserting_before(next(iter(level))):
            result = module.graph.call_function(operator.getitem, (call, at))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in level)
    for node in reversed(level):
        module.graph.erase_node(node)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), Tensor)


def _changes_others(node: Node, level: dict[Node, None]) -> bool:
    """Whether ``node`` changes in place what the level may not have made itself."""
    if not _in_place(node):
        return False
    changed = node.args[0] if node.args else None
    made_here = isinstance(changed, Node) and changed in level and _op_name(changed) in _MAKERS
    return not made_here


_MAKERS = frozenset(
    f"{prefix}{kind}{suffix}"
    for kind in ("zeros", "ones", "full", "empty")
    for prefix, suffix in (("", ""), ("new_", ""), ("", "_like"))
) | {"clone"}


def _op_name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else _name(node)


def _in_place(node: Node) -> bool:
    if node.op == "call_method":
        name = str(node.target)
        return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return node.op == "call_function" and (
        _name(node) in ("setitem", "iadd", "imul") or "out" in node.kwargs
    )


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""
