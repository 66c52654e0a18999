"""A region or router as a graph of its own, to be run at other sizes than those of the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from moe_fx.graph.lineage import trace
from moe_fx.passes.evaluate.on_host import on_host
from moe_fx.passes.evaluate.typical import constant_of
from moe_fx.region import Parts, Region


@dataclass(frozen=True)
class Extract:
    """module: the copied nodes; inputs: the original node behind each placeholder, in order;
    copies: original node -> its copy (or its placeholder)."""

    module: GraphModule
    inputs: tuple[Node, ...]
    copies: dict[Node, Node]


def extract(nodes: Sequence[Node], outputs: Sequence[Node]) -> Extract:
    """Copy ``nodes`` (in graph order), to run on the host; whatever they read from outside becomes
    a placeholder."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    inside = set(nodes)
    outside: dict[Node, None] = {}
    for node in [*nodes, *outputs]:
        sources = node.all_input_nodes if node in inside else [node]
        outside.update(dict.fromkeys(s for s in sources if s not in inside))
    for node in outside:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
        if node.op == "get_attr" and isinstance(constant := constant_of(node), torch.Tensor):
            copies[node].meta["real"] = constant
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].args, copies[node].kwargs = on_host((copies[node].args, copies[node].kwargs))
    graph.output(tuple(copies[node] for node in outputs))
    module = GraphModule(torch.nn.Module(), graph)
    return Extract(module, tuple(outside), copies)


def structure(alone: Extract) -> str:
    """The same text for graphs that differ in names only: ops, constants, shapes and dtypes, and
    what is known of the inputs' values."""
    return structure_of(alone.module.graph)


def structure_of(graph: Graph) -> str:
    numbers: dict[Node, int] = {}
    lines = []
    for node in graph.nodes:
        numbers[node] = len(numbers)
        args = node.args if node.op != "placeholder" else ()
        numbered = map_arg((args, node.kwargs), lambda n: f"%{numbers[n]}")
        known = _digest(node.meta["real"]) if "real" in node.meta else ""
        what = node.target if args or node.kwargs else node.op
        lines.append(f"{what} {numbered} {_kind(node)} {known}")
    return "\n".join(lines)


def _digest(known: torch.Tensor) -> str:
    entries = known.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(entries.numpy().tobytes()).hexdigest()[:16]


def _kind(node: Node) -> str:
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):
        return f"{val.dtype} {tuple(val.shape)} {tuple(val.stride())} {val.device.type}"
    return str(val) if isinstance(val, (torch.SymInt, int)) else type(val).__name__


def extract_region(region: Region) -> tuple[Extract, Region]:
    """The region alone, from tokens, ids, weights and what the tables come from (parameters or
    shards) to the combined result, and the same `Region` speaking of the copied nodes."""
    parts = region.parts
    made = trace(parts.tables, region.num_experts).nodes()
    alone = extract([*made, *parts.nodes], [parts.combined])
    return alone, replace(region, parts=translate(parts, alone.copies))


def translate(parts: Parts, copies: dict[Node, Node]) -> Parts:
    def many(nodes: Iterable[Node]) -> tuple[Node, ...]:
        return tuple(copies[node] for node in nodes)

    return replace(
        parts,
        select=copies.get(parts.select, parts.select),
        tokens=copies[parts.tokens],
        ids=copies[parts.ids],
        weights=None if parts.weights is None else copies[parts.weights],
        nodes=many(parts.nodes),
        dispatched=many(parts.dispatched),
        body=many(parts.body),
        cut=copies[parts.cut],
        post=many(parts.post),
        combined=copies[parts.combined],
        tables=many(parts.tables),
        gathers=tuple(
            replace(g, full=copies[g.full], shard=copies[g.shard]) for g in parts.gathers
        ),
        roles=_translated_roles(parts.roles, copies),
    )


def _translated_roles(roles: dict[Node, Any], copies: dict[Node, Node]) -> dict[Node, Any]:
    translated = {}
    for node, role in roles.items():
        if node in copies:
            source = getattr(role, "source", None)
            if source is not None:
                role = replace(role, source=copies.get(source, source))
            translated[copies[node]] = role
    return translated
