"""Which experts are a rank's: blocks of one size in rank order, as those of a DTensor's `Shard`.

Where the ranks do not divide the experts, the last ranks have fewer, or none.
"""

from __future__ import annotations

__all__ = ["block_of", "most_experts"]


def most_experts(experts: int, ranks: int) -> int:
    """Of one rank."""
    return -(-experts // ranks)


def block_of(rank: int, experts: int, ranks: int) -> range:
    """The experts of a rank."""
    each = most_experts(experts, ranks)
    return range(min(rank * each, experts), min((rank + 1) * each, experts))
