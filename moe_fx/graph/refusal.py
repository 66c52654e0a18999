"""Why a rule does not hold at a node of a graph."""

from __future__ import annotations

from torch.fx import Node

from moe_fx.graph.nodes import DROPOUTS, argument


class Refusal(Exception):
    """A rule's condition does not hold; ``reason`` is for people, ``progress`` orders refusals.
    ``unknown``: not that something is wrong, but that no rule says what it is. ``no_experts``: the
    selection is none of experts."""

    no_experts = False

    def __init__(self, reason: str, node: Node, progress: int = 0, unknown: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.node, self.progress, self.unknown = reason, node, progress, unknown


class NoExperts(Refusal):
    """No op on tokens reads a table of as many experts as are selected from."""

    no_experts = True

    def __init__(
        self,
        node: Node,
        reason: str = "no op on tokens reads a table of experts",
        progress: int = 0,
    ) -> None:
        super().__init__(reason, node, progress)


class ByChance(Refusal):
    """Rows that are computed on another rank would meet other random values there."""

    def __init__(self, node: Node, progress: int = 6) -> None:
        chance = argument(node, 1, "p") if node.target in DROPOUTS else None
        what = str(node.target) + (f" with p={chance}" if chance is not None else "")
        reason = (
            f"a random op ({what}) takes part between dispatch and combine: rows that another "
            "rank computes would meet other random values"
        )
        super().__init__(reason, node, progress)
