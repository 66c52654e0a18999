"""A sharded model's weights, whole: for checkpoints that know nothing of shards."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from moe_fx.agree import store_key
from moe_fx.compat import group_store
from moe_fx.errors import RanksDiffer

__all__ = ["full_state_dict", "meet"]

_meetings: Counter[tuple[str, str]] = Counter()  # by group and purpose, how often this rank came


def full_state_dict(model: nn.Module, *, timeout: float = 300.0) -> dict[str, Tensor]:
    """``model.state_dict()`` as it was before sharding, on the CPU of rank 0; ``{}`` on the others.

    Every rank calls this. Under the names that the model had, without those that DDP or
    ``torch.compile`` put before them. Raises `RanksDiffer` where a rank has not called it after
    ``timeout`` seconds.
    """
    meet("gather a state dict (moe_fx.full_state_dict, save_pretrained)", timeout)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: dict[str, Any] = get_model_state_dict(model, options=options)
    return whole


def meet(doing: str, timeout: float) -> None:
    """Until all ranks are here; `RanksDiffer`, which names those that are not, after ``timeout``
    seconds."""
    group = dist.group.WORLD
    assert group is not None
    count = _meetings[group.group_name, doing]
    _meetings[group.group_name, doing] += 1
    keys = [store_key(group, f"meet/{doing}/{count}/{rank}") for rank in range(group.size())]
    store = group_store(group)
    store.set(keys[group.rank()], "here")
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError:  # what a time-out is called differs from store to store
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if not missing:
            raise
        raise RanksDiffer(
            f"Rank {group.rank()} waited {timeout:g} s for rank(s) {missing} to {doing} with it. "
            "The experts are spread over the ranks: call it on every rank, not only on rank 0."
        ) from None
