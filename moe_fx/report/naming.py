"""Modules and parameters by the names that the model's author gave them.

Dynamo knows where each input of a graph comes from (``L['self'].model.layers[0]...``), and which
modules each node was made in. What is within a function's local variable starts with its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch.fx import GraphModule, Node

from moe_fx.region import source_of

__all__ = ["common_module", "layer_name", "module_of", "name_inputs", "name_of", "parameter_names"]

_HELD = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]")
_KEY = re.compile(r"\[(?:'([^']*)'|(\d+))\]")
_NO_NAME = re.compile(r"\W+")


def name_inputs(captured: GraphModule, module: GraphModule) -> None:
    """Names the inputs of ``captured`` as those of Dynamo's graph ``module`` are in the model."""
    ours, theirs = (each.graph.find_nodes(op="placeholder") for each in (captured, module))
    for node, given in zip(ours, theirs, strict=True):
        source = getattr(given, "_dynamo_source", None)
        if source is None:  # of a copy of Dynamo's graph
            source = getattr(given.meta.get("grapharg"), "source", None)
        name = "" if source is None else plain(source.name)
        identifier = _NO_NAME.sub("_", name).strip("_")
        if identifier:
            node.meta["model_name"] = name
            node._rename(identifier if not identifier[0].isdigit() else f"input_{identifier}")
            node.target = node.name
    captured.recompile()


def name_of(model: Any) -> str:
    """Of a module its class, of a function its name."""
    return getattr(model, "__qualname__", type(model).__qualname__)


def plain(source: str) -> str:
    """``model.layers.0.mlp`` for Dynamo's ``L['self']._modules['model'].layers[0]...``."""
    text = re.sub(r"^L\['self'\]|^[LG](?=\[)", "", source)
    text = _HELD.sub(r".\1", text)
    text = _KEY.sub(lambda key: f".{key[1] if key[1] is not None else key[2]}", text)
    return text.strip(".")


def module_of(node: Node) -> str:
    """The innermost module that ``node`` was made in; "" for the model itself, or if none is
    known."""
    path = _modules(node)
    return path[-1] if path else ""


def common_module(nodes: Iterable[Node]) -> str:
    """The innermost module that all ``nodes`` were made in."""
    paths = [_modules(node) for node in nodes]
    common = paths[0] if paths else []
    for path in paths[1:]:
        common = [one for one, other in zip(common, path, strict=False) if one == other]
    return common[-1] if common else ""


def layer_name(router: Node, result: Node) -> str:
    """``model.layers.3.mlp (modeling_x.py:12)`` of the module that holds both nodes; the line alone
    if the graph does not tell modules apart."""
    source, path = source_of(router), common_module([router, result])
    return f"{path} ({source})" if path and source else path or source


def parameter_names(tables: Iterable[Node]) -> tuple[str, ...]:
    """The parameters and buffers that ``tables`` are made of, in the model's words."""
    found: dict[str, None] = {}
    seen: set[Node] = set()
    stack = list(tables)[::-1]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" and "model_name" in node.meta:
            found[node.meta["model_name"]] = None
        stack += reversed(node.all_input_nodes)
    return tuple(found)


def _modules(node: Node) -> list[str]:
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    return [plain(path) for path, _ in stack.values()]
