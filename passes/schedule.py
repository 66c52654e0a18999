"""Schedule: an order of pure nodes in which exchanges run beside compute.

Contract. In: nodes in a legal order, and what each costs. Out: the same nodes in a legal order.
Collectives keep their order, whatever the costs say, so that ranks with other costs agree.

Two resources are simulated: the compute thread, which runs nodes one at a time, and the link, which
serves exchanges in the order in which they start. Pseudo-code::

    rank of a node = seconds from its start to the end along the longest way that needs it
    until all nodes are placed:
        a start, as soon as its inputs are there
        else the node of highest rank that does not have to wait
        else the wait whose exchange ends first

(List scheduling by upward rank: Topcuoglu, Hariri, Wu, "Performance-effective and low-complexity
task scheduling for heterogeneous computing", 2002.)
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.fx import Node

__all__ = ["Costs", "STARTS", "Timeline", "WAITS", "peak_bytes", "schedule", "simulate"]

ops = torch.ops.moe_fx
STARTS = (ops.all_to_all.default,)
WAITS = (ops.wait.default, ops.wait_after.default)


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
    ranks = _upward_ranks(nodes, needs, costs)
    missing = {node: len(needs[node]) for node in nodes}
    users: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in nodes:
        for source in needs[node]:
            users[source].append(node)
    machine = _Machine(costs)
    order: list[Node] = []
    at = {node: position for position, node in enumerate(nodes)}
    ready: list[tuple[bool, float, int, Node]] = []
    waits: list[Node] = []

    def offer(node: Node) -> None:
        if node.target in WAITS:
            waits.append(node)
        else:
            heapq.heappush(ready, (node.target not in STARTS, -ranks[node], at[node], node))

    for node in nodes:
        if not missing[node]:
            offer(node)
    while ready or waits:
        node = _next(ready, waits, ranks, at, machine)
        machine.run(node)
        order.append(node)
        for user in users[node]:
            missing[user] -= 1
            if not missing[user]:
                offer(user)
    return order


def _next(
    ready: list[tuple[bool, float, int, Node]],
    waits: list[Node],
    ranks: dict[Node, float],
    at: dict[Node, int],
    machine: _Machine,
) -> Node:
    free = [wait for wait in waits if not machine.blocked(wait)]
    best = min(free, key=lambda wait: (-ranks[wait], at[wait]), default=None)
    if ready and (best is None or ready[0][:3] < (True, -ranks[best], at[best])):
        return heapq.heappop(ready)[3]
    if best is None:
        best = min(waits, key=lambda wait: (machine.blocked(wait), -ranks[wait], at[wait]))
    waits.remove(best)
    return best


def _needs(nodes: Sequence[Node]) -> dict[Node, set[Node]]:
    """Of each node, the nodes that come before it: inputs, and for a collective the one before."""
    inside = set(nodes)
    needs: dict[Node, set[Node]] = {}
    last: Node | None = None
    for node in nodes:
        needs[node] = {source for source in node.all_input_nodes if source in inside}
        if is_collective(node):
            if last is not None:
                needs[node].add(last)
            last = node
    return needs


def is_collective(node: Node) -> bool:
    """Something that every rank must do in the same order."""
    if node.target in STARTS or node.target is ops.exchange_counts.default:
        return True
    namespace = getattr(node.target, "namespace", "")
    name = getattr(node.target, "__name__", "")
    return namespace in ("_c10d_functional", "c10d_functional", "c10d") and "wait" not in name


def _upward_ranks(
    nodes: Sequence[Node], needs: dict[Node, set[Node]], costs: Costs
) -> dict[Node, float]:
    ranks = dict.fromkeys(nodes, 0.0)
    for node in reversed(nodes):
        own = costs.exchange(node) if node.target in STARTS else costs.compute(node)
        ranks[node] += own
        for source in needs[node]:
            ranks[source] = max(ranks[source], ranks[node])
    return ranks


def peak_bytes(order: Sequence[Node], sizes: dict[Node, int]) -> int:
    """The most bytes of ``order``'s results that are alive at once; a start's includes what it
    receives. Views are counted as if they were copies, in every order alike."""
    last = {source: node for node in order for source in (*node.all_input_nodes, node)}
    ends: dict[Node, list[Node]] = {}
    for node, end in last.items():
        ends.setdefault(end, []).append(node)
    alive = peak = 0
    for node in order:
        alive += sizes.get(node, 0)
        peak = max(peak, alive)
        for gone in ends.get(node, ()):
            if any(user not in last for user in gone.users):
                continue  # read outside
            alive -= sizes.get(gone, 0)
    return peak

