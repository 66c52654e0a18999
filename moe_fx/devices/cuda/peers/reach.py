"""Whether the ranks of a group can write to each other's GPUs: on one host, over NVLink or PCIe."""

from __future__ import annotations

import json
import os
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from moe_fx.compat import group_store
from moe_fx.devices.cuda.peers.board import board_of
from moe_fx.ranks.agree import wait_for
from moe_fx.ranks.presence import store_key

__all__ = ["unreachable"]

_found: WeakKeyDictionary[dist.ProcessGroup, str] = WeakKeyDictionary()


def unreachable(group: dist.ProcessGroup, device: torch.device, timeout: float) -> str:
    """Why they cannot; "" if they can. The same on every rank, which all ask."""
    if group not in _found:
        board = board_of(group, timeout)
        _found[group] = board if isinstance(board, str) else _no_peers(group, device, timeout)
    return _found[group]


def _no_peers(group: dist.ProcessGroup, device: torch.device, timeout: float) -> str:
    number = torch.cuda.current_device() if device.index is None else device.index
    numbers = _exchanged(group, "number", str(number), timeout)
    if len(set(numbers)) < len(numbers):  # of different GPUs: refused by torch's symmetric memory
        return (
            "ranks have GPUs of the same number, which torch's symmetric memory does not take. Let "
            "every process see all GPUs (CUDA_VISIBLE_DEVICES), and take one by its local rank"
        )
    own = str(torch.cuda.get_device_properties(device).uuid)
    devices = _exchanged(group, "gpu", own, timeout)
    problems = _exchanged(group, "reach", _problem(group.rank(), device, devices), timeout)
    return next(filter(None, problems), "")


def _problem(rank: int, device: torch.device, devices: list[str]) -> str:
    """Of this rank. devices: of every rank."""
    if os.environ.get("NCCL_P2P_DISABLE", "0") not in ("0", ""):
        return "NCCL_P2P_DISABLE is set"
    if len(set(devices)) < len(devices):
        return "ranks share a GPU"
    visible = {
        str(torch.cuda.get_device_properties(at).uuid): at
        for at in range(torch.cuda.device_count())
    }
    for other, uuid in enumerate(devices):
        at = visible.get(uuid)
        if other == rank:
            continue
        if at is None:
            return f"rank {rank} does not see the GPU of rank {other} (CUDA_VISIBLE_DEVICES)"
        if not torch.cuda.can_device_access_peer(device, at):
            return f"the GPU of rank {rank} cannot access that of rank {other}"
    return ""


def _exchanged(group: dist.ProcessGroup, what: str, own: str, timeout: float) -> list[str]:
    store = group_store(group)
    keys = {rank: store_key(group, f"{what}/{rank}") for rank in range(group.size())}
    store.set(keys[group.rank()], json.dumps(own))
    wait_for(group, keys, timeout, "looks for the GPUs of its host")
    return [json.loads(store.get(key)) for key in keys.values()]
