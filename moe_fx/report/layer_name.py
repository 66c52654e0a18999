"""What a layer is called where someone has to find it: its module's path and its source line."""

from __future__ import annotations

import re

from torch.fx import Node

from moe_fx.region import source_of

_SELF = re.compile(r"^L\['\w+'\]\.?")


def layer_name(router: Node, result: Node) -> str:
    """``model.layers.3.mlp (modeling_x.py:12)`` of the module that holds both nodes; the line alone
    if the graph does not tell modules apart."""
    source = source_of(router)
    path = _path(router, result)
    return f"{path} ({source})" if path and source else path or source


def _path(router: Node, result: Node) -> str:
    """Of the innermost module that both are in."""
    path = ""
    for one, other in zip(_modules(router), _modules(result), strict=False):
        if one != other:
            break
        path = one
    return path


def _modules(node: Node) -> list[str]:
    """Paths of the modules that a node is in, from the outside in."""
    stack = node.meta.get("nn_module_stack") or {}
    return [_SELF.sub("", str(path)) for path, _ in stack.values()]
