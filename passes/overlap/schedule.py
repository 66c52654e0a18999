"""Schedule: an order of pure nodes in which exchanges run beside compute.

Contract. In: nodes in a legal order, and what each costs. Out: the same nodes in a legal order.
What may communicate keeps its order, whatever the costs say, so that ranks with other costs agree.

Two resources are simulated: the compute thread, which runs nodes one at a time, and the link, which
serves exchanges in the order in which they start. Pseudo-code::

    stage of a node = the first that communicates and needs it (none: last of all)
    until all nodes are placed, of those whose inputs are there:
        a start, if there is one: the link is to have work as early as it can
        else the node of the earliest stage that does not have to wait, in the order that was
        else the wait whose exchange ends first

So what leads to the next exchange is done first, and what leads to none fills the waiting.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.fx import Node

__all__ = ["STARTS", "WAITS", "Costs", "Timeline", "peak_bytes", "schedule", "simulate"]

ops = torch.ops.moe_fx
STARTS = (ops.all_to_all.default,)
WAITS = (ops.wait.default, ops.wait_after.default)
_EXCHANGES = (
    *STARTS,
    ops.exchange_counts.default,
    ops.even_sizes.default,
    ops.distribute.default,
    ops.collect.default,
    ops.direct_dispatch.default,
    ops.direct_combine.default,
    ops.direct_experts.default,
)


class Costs(Protocol):
    def compute(self, node: Node) -> float:
        """Seconds that ``node`` occupies the compute thread; of a wait, without the waiting."""

    def exchange(self, node: Node) -> float:
        """Seconds that the exchange which ``node`` starts occupies the link."""


@dataclass
class Timeline:
    """seconds: to the end of the last node. exposed: seconds spent waiting for exchanges."""

    seconds: float = 0.0
    exposed: float = 0.0


class _Machine:
    """The two resources."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.now = self.link_free = self.exposed = 0.0
        self.done: dict[Node, float] = {}

    def blocked(self, wait: Node) -> float:
        """Seconds until what ``wait`` waits for is there; what started elsewhere is."""
        return max(0.0, self.done.get(_start_of(wait), 0.0) - self.now)

    def run(self, node: Node) -> None:
        if node.target in STARTS:
            self.link_free = max(self.link_free, self.now) + self.costs.exchange(node)
            self.done[node] = self.link_free
        elif node.target in WAITS:
            blocked = self.blocked(node)
            self.exposed += blocked
            self.now += blocked
        self.now += self.costs.compute(node)


def _start_of(wait: Node) -> Node:
    start = wait.args[0]
    assert isinstance(start, Node)
    return start


def simulate(order: Iterable[Node], costs: Costs) -> Timeline:
    """What this order takes."""
    machine = _Machine(costs)
    for node in order:
        machine.run(node)
    return Timeline(machine.now, machine.exposed)


def schedule(nodes: Sequence[Node], costs: Costs) -> list[Node]:
    needs = _needs(nodes)
    stages = _stages(nodes, needs)
    missing = {node: len(needs[node]) for node in nodes}
    users: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in nodes:
        for source in needs[node]:
            users[source].append(node)
    machine = _Machine(costs)
    keys = {node: (node.target not in STARTS, stages[node], at) for at, node in enumerate(nodes)}
    ready: list[tuple[tuple[bool, int, int], Node]] = []
    waits: list[Node] = []
    order: list[Node] = []

    def offer(node: Node) -> None:
        if node.target in WAITS:
            waits.append(node)
        else:
            heapq.heappush(ready, (keys[node], node))

    for node in nodes:
        if not missing[node]:
            offer(node)
    while ready or waits:
        free = [wait for wait in waits if not machine.blocked(wait)]
        best = min(free, key=keys.__getitem__, default=None)
        if ready and (best is None or ready[0][0] < keys[best]):
            node = heapq.heappop(ready)[1]
        else:
            node = best or min(waits, key=lambda wait: (machine.blocked(wait), keys[wait]))
            waits.remove(node)
        machine.run(node)
        order.append(node)
        for user in users[node]:
            missing[user] -= 1
            if not missing[user]:
                offer(user)
    return order


def _needs(nodes: Sequence[Node]) -> dict[Node, set[Node]]:
    """Of each node, the nodes that come before it: inputs; for what may communicate the one before;
    for an op that draws random numbers the one before."""
    inside = set(nodes)
    needs: dict[Node, set[Node]] = {}
    last: dict[str, Node] = {}
    for node in nodes:
        needs[node] = {source for source in node.all_input_nodes if source in inside}
        chain = "collective" if may_communicate(node) else "random" if _is_random(node) else ""
        if chain:
            if chain in last:
                needs[node].add(last[chain])
            last[chain] = node
    return needs


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def may_communicate(node: Node) -> bool:
    """Every rank must do it in the same order: an exchange, and any op of whose kernel nothing is
    known."""
    if node.target in _EXCHANGES:
        return True
    namespace = getattr(node.target, "namespace", None)
    return namespace not in (None, "aten", "prims", "moe_fx")


def _stages(nodes: Sequence[Node], needs: dict[Node, set[Node]]) -> dict[Node, int]:
    collectives = [node for node in nodes if may_communicate(node)]
    stages = dict.fromkeys(nodes, len(collectives))
    stages.update({node: at for at, node in enumerate(collectives)})
    for node in reversed(nodes):
        for source in needs[node]:
            stages[source] = min(stages[source], stages[node])
    return stages


def peak_bytes(
    order: Sequence[Node], sizes: Callable[[Node], int], base: Callable[[Node], Node]
) -> int:
    """The most bytes of ``order``'s results that are alive at once; what is read outside stays to
    the end. sizes: of a node's own storage; base: the node whose storage a view shows."""
    ends: dict[Node, int] = {}
    inside = set(order)
    for at, node in enumerate(order):
        for read in (node, *node.all_input_nodes):
            ends[base(read)] = at
        if not inside.issuperset(node.users):
            ends[base(node)] = len(order)
    gone: dict[int, int] = {}
    alive = peak = 0
    for at, node in enumerate(order):
        if base(node) is node:
            alive += sizes(node)
            gone[ends[node]] = gone.get(ends[node], 0) + sizes(node)
        peak = max(peak, alive)
        alive -= gone.pop(at, 0)
    return peak
