"""One decision for all ranks, through the group's store: no collective, and never a hang.

Ranks see other numbers of tokens and measure other speeds, but must exchange alike. So the group's
first rank decides and the others take what it has decided; a decision stands for the process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_fx.compat import group_store
from moe_fx.errors import RanksDiffer
from moe_fx.link import Link, calibrate, measured_already

_decided: dict[tuple[str, str], Any] = {}


def decide(group: dist.ProcessGroup, about: str, choose: Callable[[], Any], timeout: float) -> Any:
    """What rank 0 of ``group`` chose ``about`` something: JSON data. ``choose`` is called there
    only, once. Raises `RanksDiffer` after ``timeout`` seconds without a decision."""
    known = (group.group_name, about)
    if known not in _decided:
        key = _key(group, f"decision/{hashlib.sha256(about.encode()).hexdigest()[:16]}")
        store = group_store(group)
        if group.rank() == 0:
            store.set(key, json.dumps(choose()))
        else:
            _wait(group, [key], [0], timeout)
        _decided[known] = json.loads(store.get(key))
    return _decided[known]


def link_of(group: dist.ProcessGroup, device: torch.device, timeout: float) -> Link:
    """The group's measured link. Measuring takes all ranks: they are waited for first, and one that
    does not come is an error after ``timeout`` seconds."""
    if not measured_already(group, device):
        keys = [_key(group, f"link/{device.type}/{rank}") for rank in range(group.size())]
        group_store(group).set(keys[group.rank()], "here")
        _wait(group, keys, list(range(group.size())), timeout)
    return calibrate(group, device)


def _wait(group: dist.ProcessGroup, keys: list[str], ranks: list[int], timeout: float) -> None:
    store = group_store(group)
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError:  # what a time-out is called differs from store to store
        missing = [r for r, key in zip(ranks, keys, strict=True) if not store.check([key])]
        if not missing:
            raise
        raise RanksDiffer(
            f"Rank {group.rank()} plans a MoE layer and waited {timeout:g} s for rank(s) {missing} "
            "of the expert-parallel group to plan theirs. Every rank must compile and run the same "
            "model; look for an error there, or raise agree_timeout."
        ) from None


def _key(group: dist.ProcessGroup, what: str) -> str:
    digest = hashlib.sha256(group.group_name.encode()).hexdigest()[:12]
    return f"moe_fx/{what}/{digest}"
