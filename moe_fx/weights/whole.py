"""A sharded model's weights, whole: for checkpoints that know nothing of shards."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moe_fx.compat import group_store
from moe_fx.errors import RanksDiffer
from moe_fx.ranks.presence import store_key

__all__ = ["full_state_dict", "meet"]

_meetings: Counter[tuple[str, str]] = Counter()  # by group and purpose, how often this rank came


def full_state_dict(model: nn.Module, *, timeout: float = 300.0) -> dict[str, Tensor]:
    """``model.state_dict()`` as it was before sharding, on the CPU of rank 0; ``{}`` on the others.

    Every rank calls this. Under the names that the model had, without those that DDP or
    ``torch.compile`` put before them. One table is gathered at a time. Raises `RanksDiffer` where a
    rank has not called it after ``timeout`` seconds.
    """
    meet("gather a state dict (moe_fx.full_state_dict, save_pretrained)", timeout)
    if isinstance(model, DistributedDataParallel):
        model = model.module
    whole: dict[str, Tensor] = {}
    tied: dict[tuple[Any, ...], Tensor] = {}
    for name, held in model.state_dict().items():
        value: Any = held
        local = value.to_local() if isinstance(value, DTensor) else value
        key = local.data_ptr(), local.dtype, value.shape, value.stride()
        if key not in tied:
            full = value.full_tensor() if isinstance(value, DTensor) else value
            tied[key] = full.cpu() if dist.get_rank() == 0 else full.new_empty(0)
        whole[name.replace("_orig_mod.", "")] = tied[key]
    return whole if dist.get_rank() == 0 else {}


def meet(doing: str, timeout: float) -> None:
    """Until all ranks are here; `RanksDiffer`, which names those that are not, after ``timeout``
    seconds."""
    group = dist.group.WORLD
    assert group is not None
    count = _meetings[group.group_name, doing]
    keys = [store_key(group, f"meet/{doing}/{count}/{rank}") for rank in range(group.size())]
    store = group_store(group)
    store.set(keys[group.rank()], "here")
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError:  # what a time-out is called differs from store to store
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if not missing:
            raise
        store.delete_key(keys[group.rank()])  # who comes later is not to think that this rank waits
        raise RanksDiffer(
            f"Rank {group.rank()} waited {timeout:g} s for rank(s) {missing} to {doing} with it. "
            "The experts are spread over the ranks: call it on every rank, not only on rank 0."
        ) from None
    _meetings[group.group_name, doing] += 1
