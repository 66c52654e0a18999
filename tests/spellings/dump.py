"""``python -m tests.spellings.dump DIR [NAME ...]``: each spelling's captured graph as text.

Per graph, one line per node of the normalised graph: name, op, arguments, shape and dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moe_fx import passes
from moe_fx.capture.capture import capture
from moe_fx.options import Options
from moe_fx.passes.normalise.normalise import Normalise
from moe_fx.report import Report
from tests.spellings import SPELLINGS, Spelling


def graphs_of(
    model: Callable[..., Any], *args: Any, fullgraph: bool = False, dynamic: bool | None = False
) -> list[GraphModule]:
    """The captured graphs of ``model(*args)``, normalised; more than one if capture breaks."""
    found: list[GraphModule] = []

    def record(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        context = passes.Context(options=Options(), report=Report())
        found.append(Normalise()(capture(module, inputs), context).module)
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=record, fullgraph=fullgraph, dynamic=dynamic)(*args)
    torch._dynamo.reset()
    return found


def as_text(module: GraphModule) -> str:
    return "\n".join(map(_line, module.graph.nodes)) + "\n"


def _line(node: Node) -> str:
    arguments = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
    target = "" if node.op in ("placeholder", "output") else f" {node.target}"
    return f"{node.name} = {node.op}{target}({arguments})  # {_value(node.meta.get('val'))}"


def _value(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_value, value)) + ")"
    return "" if value is None else f"{type(value).__name__} {value}"


def describe(spelling: Spelling) -> str:
    """The record as comment lines, then the graph."""
    fields = {k: v for k, v in vars(spelling).items() if k != "build"}
    graphs = graphs_of(spelling.build(), spelling.tokens(), fullgraph=spelling.needs_fullgraph)
    header = "".join(f"# {key}: {value}\n" for key, value in fields.items())
    return header + "\n".join(f"# graph {at}\n{as_text(g)}" for at, g in enumerate(graphs))


def main(folder: str, *names: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in names or SPELLINGS:
        Path(folder, f"{name}.txt").write_text(describe(SPELLINGS[name]))
        print(name)


if __name__ == "__main__":
    main(*sys.argv[1:])
