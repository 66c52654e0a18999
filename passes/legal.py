"""What is legal in a graph between stages: a program that breaks it would hang, or read rows that
have not arrived.

After `rewrite` and all later stages each exchange that is started has one wait, and each wait is of
an exchange that was started before it. `overlap` keeps every collective in its place among the
collectives, on every rank the same. Checked under ``strict`` and in moe_fx's own tests
(``MOE_FX_NET=0``), as a compiled graph is checked by whoever runs it otherwise.
"""

from __future__ import annotations

import os

from torch.fx import Graph, Node

from moe_fx.errors import MoeFxError
from moe_fx.passes.overlap.schedule import STARTS, WAITS, may_communicate

__all__ = ["IllegalGraph", "check_order", "check_pairs", "collectives", "in_tests"]


class IllegalGraph(MoeFxError):
    """A stage has made a graph that may not be run: a bug of moe_fx."""


def collectives(graph: Graph) -> list[Node]:
    """The nodes by which ranks meet, in the order in which they do."""
    return [node for node in graph.nodes if may_communicate(node)]


def in_tests() -> bool:
    return os.environ.get("MOE_FX_NET") == "0"


def check_pairs(graph: Graph) -> None:
    """Raises `IllegalGraph` unless each start has one wait, and each wait a start before it."""
    started: set[Node] = set()
    for node in graph.nodes:
        if node.target in STARTS:
            started.add(node)
        elif node.target in WAITS:
            handle = node.args[0]
            if handle not in started:
                raise IllegalGraph(
                    f"{node} waits for {handle}, which is no exchange that was started before it "
                    "and not waited for yet"
                )
            started.discard(handle)
    if started:
        names = ", ".join(map(str, started))
        raise IllegalGraph(f"nothing waits for {names}: what was sent there is never received")


def check_order(before: list[Node], graph: Graph) -> None:
    """Raises `IllegalGraph` unless the collectives of ``graph`` are those of ``before``, in that
    order: ranks that meet in another order hang."""
    now = collectives(graph)
    if now != before:
        raise IllegalGraph(f"overlap has changed the order of collectives: {before} became {now}")
