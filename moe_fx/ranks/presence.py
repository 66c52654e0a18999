"""Where the ranks of a group stand, as those that wait for long tell each other.

A rank that waits for others says in the group's store what it waits in, once it has waited for a
while, and takes it back when the wait is over. So a wait that ends in time costs no message, and
whoever gives up knows who waits with it and who does not.

Two ranks that wait for each other in different places (one in an exchange, the other for an
agreement on a graph that the first has not compiled) will wait for ever: `crossed` says so, to
both, long before a timeout would.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch.distributed as dist

from moe_fx.compat import group_store

_LONGEST = 5.0
"""Seconds, at most, that a rank waits before it says so."""

_started: Counter[str] = Counter()


@dataclass(frozen=True)
class Stand:
    """What a rank waits in.

    number: exchanges of the group that it has started so far; in an exchange, that one is the last.
    what: what is waited for, as a reader understands it ("rows of model.layers.3.mlp").
    keys: the store's key that it waits for each rank to set, by the rank in words; none where it
        waits in an exchange.
    """

    number: int
    what: str
    keys: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.what if self.keys else f"exchange {self.number} ({self.what})"


def patience(timeout: float) -> float:
    """Seconds that a rank waits before it says so, and between two looks at where others stand."""
    return max(0.05, min(_LONGEST, timeout / 4))


def next_exchange(group: dist.ProcessGroup, what: str) -> Stand:
    """Where this rank stands when it starts its next exchange of the group."""
    _started[group.group_name] += 1
    return Stand(_started[group.group_name], what)


def agreeing(group: dist.ProcessGroup, what: str, keys: Mapping[int, str]) -> Stand:
    """Where this rank stands when it waits for others to set their keys."""
    by_rank = {str(rank): key for rank, key in keys.items()}
    return Stand(_started[group.group_name], what, by_rank)


def say(group: dist.ProcessGroup, stand: Stand | None) -> None:
    """Tell the others; None: this rank waits no more."""
    text = "" if stand is None else json.dumps(asdict(stand))
    group_store(group).set(_key(group, group.rank()), text)


def others(group: dist.ProcessGroup) -> dict[int, Stand]:
    """Where each other rank of the group waits, of those that say that they do."""
    store = group_store(group)
    found = {}
    for rank in range(group.size()):
        key = _key(group, rank)
        if rank != group.rank() and store.check([key]):
            text = store.get(key).decode()
            if text:
                found[rank] = Stand(**json.loads(text))
    return found


def give_up(group: dist.ProcessGroup) -> None:
    """This rank has stopped waiting, and raises."""
    group_store(group).set(_gave_up_key(group, group.rank()), "")


def gave_up(group: dist.ProcessGroup) -> list[int]:
    """The other ranks that have stopped waiting."""
    store, others = group_store(group), set(range(group.size())) - {group.rank()}
    return [rank for rank in sorted(others) if store.check([_gave_up_key(group, rank)])]


def crossed(group: dist.ProcessGroup, own: Stand) -> str:
    """Which rank will never come because it waits for this one, in a sentence; "" if none says so.

    An exchange and an agreement wait for each other if the rank in the exchange has not set its key
    of the agreement, and the other has not started that exchange. Neither changes while both wait.
    """
    store = group_store(group)
    for rank, other in others(group).items():
        if bool(own.keys) == bool(other.keys):
            continue
        agrees, exchanges = (own, other) if own.keys else (other, own)
        key = agrees.keys.get(str(rank if own.keys else group.rank()))
        if key and exchanges.number > agrees.number and not store.check([key]):
            return (
                f"rank {group.rank()} waits in {own}, and rank {rank}, which would have to come to "
                f"it, in {other}"
            )
    return ""


def differing(how: str) -> str:
    """The message of `crossed`."""
    return (
        f"Ranks run different MoE graphs, which would hang: {how}. Give every rank the same model, "
        "options and mode (training or inference), and the same steps in the same order."
    )


def named(group: dist.ProcessGroup, ranks: Sequence[int]) -> str:
    """``rank(s) [...]`` of the group, and in all, where these numbers differ."""
    overall = [dist.get_global_rank(group, rank) for rank in ranks]
    also = "" if overall == list(ranks) else f" (of all ranks: {overall})"
    return f"rank(s) {list(ranks)}{also}"


def store_key(group: dist.ProcessGroup, what: str) -> str:
    digest = hashlib.sha256(group.group_name.encode()).hexdigest()[:12]
    return f"moe_fx/{digest}/{what}"


def _key(group: dist.ProcessGroup, rank: int) -> str:
    return store_key(group, f"stands/{rank}")


def _gave_up_key(group: dist.ProcessGroup, rank: int) -> str:
    return store_key(group, f"gave_up/{rank}")
