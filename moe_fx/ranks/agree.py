"""Ranks compile separately and must agree: their plans are compared before the first run.

Every rank publishes the distinct fingerprints of its compiled graphs, in order, in the group's
store; the n-th of each must be equal. A graph compiled again for other shapes has the same
fingerprint and needs no new agreement. A mismatch is an error on every rank, and a rank that never
compiles is an error after a timeout: never a hang.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moe_fx.compat import group_store, resolve_group
from moe_fx.errors import RanksDiffer
from moe_fx.plan import ExchangePlan
from moe_fx.ranks.presence import agreeing, crossed, differing, patience, say, store_key

_LEAST = 0.001
"""Seconds; a store takes none to be no limit."""
_published: dict[tuple[str, str], list[str]] = {}
_agreed: set[tuple[str, str]] = set()


def describe(plans: Sequence[ExchangePlan], training: bool) -> str:
    """What must be the same on every rank, as text: how tokens travel, not how long it may take."""
    alike = [
        {k: v for k, v in asdict(plan).items() if k not in ("rank", "predicted", "buffer_bytes")}
        for plan in plans
    ]
    return json.dumps({"training": training, "regions": alike}, sort_keys=True)


def agree_once(
    compiled: Callable[..., Any],
    groups: Collection[str],
    plans: Sequence[ExchangePlan],
    training: bool,
    timeout: float,
) -> Callable[..., Any]:
    """``compiled``, which before its first run makes sure that all ranks of ``groups`` have the
    same plans (none at all is a plan too)."""
    text = describe(plans, training)
    for name in groups:
        publish(name, text)
    pending = [name for name in sorted(groups) if (name, text) not in _agreed]

    @functools.wraps(compiled)
    def run(*args: Any) -> Any:
        while pending:
            compare(resolve_group(pending[-1]), text, timeout)
            pending.pop()
        return compiled(*args)

    return run


def ensure(group_name: str, text: str, timeout: float) -> None:
    """All ranks of the group have the plans that ``text`` describes; asks them once.

    For graphs that a cache may bring back without their being compiled: it is called when the graph
    runs (`moe_fx::exchange_counts`).
    """
    if (group_name, text) not in _agreed:
        publish(group_name, text)
        compare(resolve_group(group_name), text, timeout)


def ensure_same(group_name: str, text: str, timeout: float) -> None:
    """All ranks of the group dispatch tokens as ``text`` describes; asks them once."""
    if (group_name, text) not in _agreed:
        publish(group_name, text, "dispatchers")
        compare(resolve_group(group_name), text, timeout, "dispatchers")


def publish(group_name: str, text: str, kind: str = "plans") -> None:
    """Tell the group what this rank has compiled ("plans") or dispatches with ("dispatchers"),
    unless it has told the same before."""
    history = _published.setdefault((group_name, kind), [])
    if text in history:
        return
    group = resolve_group(group_name)
    group_store(group).set(_key(group, group.rank(), len(history), kind), text)
    history.append(text)


def compare(group: dist.ProcessGroup, text: str, timeout: float, kind: str = "plans") -> None:
    """Raise `RanksDiffer` unless every rank of the group has published ``text`` at this place."""
    store = group_store(group)
    place = _published[group.group_name, kind].index(text)
    keys = {rank: _key(group, rank, place, kind) for rank in range(group.size())}
    doing = "dispatches tokens"
    if kind == "plans":
        doing = f"has compiled MoE graph {place + 1} ({_summary(text)})"
    wait_for(group, keys, timeout, doing)
    differing = {
        rank: theirs for rank, key in keys.items() if (theirs := store.get(key).decode()) != text
    }
    if differing:
        rank, theirs = next(iter(differing.items()))
        what, difference = _DIFFERENCES[kind]
        raise RanksDiffer(
            f"Ranks {what}, which would hang: rank {group.rank()} has {difference(text, theirs)} "
            f"where rank {rank} has {difference(theirs, text)} (ranks that differ from rank "
            f"{group.rank()}: {sorted(differing)}). Give every rank the same model, options and "
            "mode (training or inference)."
        )
    _agreed.add((group.group_name, text))


def wait_for(group: dist.ProcessGroup, keys: Mapping[int, str], timeout: float, doing: str) -> None:
    """Until each rank of ``keys`` has set its key in the group's store; `RanksDiffer` after
    ``timeout`` seconds, or as soon as one of them is known to wait for this rank elsewhere. doing:
    what this rank does ("has compiled ...") and expects of them."""
    pause = patience(timeout)
    deadline = time.monotonic() + timeout
    if _are_set(group, keys, pause):
        return
    stand = agreeing(group, f"an agreement, as it {doing}", keys)
    say(group, stand)
    while not _are_set(group, keys, min(pause, deadline - time.monotonic())):
        how = crossed(group, stand)
        if how:
            raise RanksDiffer(differing(how))
        if time.monotonic() >= deadline:
            store = group_store(group)
            missing = [rank for rank, key in keys.items() if not store.check([key])]
            say(group, None)  # whoever catches the error may go on with the group
            raise RanksDiffer(
                f"Rank {group.rank()} {doing} and waited {timeout:g} s for rank(s) {missing} of "
                "the expert-parallel group to do the same. Every rank must compile and run the "
                "same model; look for an error there, or raise agree_timeout."
            )
    say(group, None)


def _are_set(group: dist.ProcessGroup, keys: Mapping[int, str], seconds: float) -> bool:
    """Whether they are within so many seconds."""
    store, names = group_store(group), list(keys.values())
    try:
        store.wait(names, timedelta(seconds=max(seconds, _LEAST)))
    except RuntimeError:  # what a time-out is called differs from store to store
        return store.check(names)
    return True


def _summary(text: str) -> str:
    """Of plans, in few words: ``training; alltoall in 2 chunks, of 3``."""
    described = json.loads(text)
    layers = []
    for plan in described["regions"]:
        pieces = plan["expert_slices"] * plan["token_slices"] * plan["row_slices"]
        layers.append(plan["strategy"] + (f" in {pieces} chunks" if pieces > 1 else ""))
    mode = "training" if described["training"] else "inference"
    return f"{mode}; {', '.join(dict.fromkeys(layers)) or 'no MoE layer'}, of {len(layers)}"


def _difference(text: str, other: str) -> str:
    mine, theirs = json.loads(text), json.loads(other)
    if mine["training"] != theirs["training"]:
        return "a training graph" if mine["training"] else "an inference graph"
    if len(mine["regions"]) != len(theirs["regions"]):
        return f"{len(mine['regions'])} MoE layers"
    for at, (a, b) in enumerate(zip(mine["regions"], theirs["regions"], strict=True)):
        if a != b:
            return f"in layer {at} " + ", ".join(f"{k}={v}" for k, v in a.items() if b[k] != v)
    return "the same"


def _key(group: dist.ProcessGroup, rank: int, place: int, kind: str) -> str:
    return store_key(group, f"{kind}/{rank}/{place}")


_DIFFERENCES: dict[str, tuple[str, Callable[[str, str], str]]] = {
    "plans": ("compiled different MoE graphs", _difference),
    "dispatchers": ("use different dispatchers", lambda text, other: text),
}
