"""One decision for all ranks, through the group's store: no collective, and never a hang.

Ranks see other numbers of tokens and measure other speeds, but must exchange alike. So the group's
first rank decides and the others take what it has decided; a decision stands for the process.

All of them measure, at the same time: ranks that share a machine share its memory, and one that
measures while the others wait would find more of it than it will have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moe_fx.compat import group_store
from moe_fx.cost.link import Link, calibrate, known
from moe_fx.ranks.agree import wait_for
from moe_fx.ranks.presence import store_key

_decided: dict[tuple[str, str], Any] = {}
_DOING = "plans an MoE layer"


def decide(group: dist.ProcessGroup, about: str, choose: Callable[[], Any], timeout: float) -> Any:
    """What rank 0 of ``group`` chose ``about`` something: JSON data. ``choose`` is called once on
    every rank. Raises `RanksDiffer` after ``timeout`` seconds without a decision."""
    place = (group.group_name, about)
    if place not in _decided:
        digest = hashlib.sha256(about.encode()).hexdigest()[:16]
        key = store_key(group, f"decision/{digest}")
        store = group_store(group)
        chosen = choose()
        if group.rank() == 0:
            store.set(key, json.dumps(chosen))
        else:
            wait_for(group, {0: key}, timeout, _DOING)
        _decided[place] = json.loads(store.get(key))
    return _decided[place]


def link_of(group: dist.ProcessGroup, device: torch.device, timeout: float) -> Link:
    """The group's measured link. Measuring takes all ranks: they are waited for first, and one that
    does not come is an error after ``timeout`` seconds."""
    if known(group, device) is None:
        keys = {r: store_key(group, f"link/{device.type}/{r}") for r in range(group.size())}
        group_store(group).set(keys[group.rank()], "here")
        wait_for(group, keys, timeout, _DOING)
    return calibrate(group, device)
