"""Which ranks hold the same shard, where the ranks that share the experts are some of all ranks."""

from __future__ import annotations

import itertools
import json
from weakref import WeakKeyDictionary

import torch.distributed as dist

from moe_fx.compat import group_store
from moe_fx.errors import ConfigurationError
from moe_fx.ranks.agree import wait_for
from moe_fx.ranks.presence import store_key

__all__ = ["replicas"]

_TIMEOUT = 300.0
_found: WeakKeyDictionary[dist.ProcessGroup, str | None] = WeakKeyDictionary()
_asked = itertools.count()


def replicas(group: dist.ProcessGroup) -> str | None:
    """The name of the group of ranks at this rank's place in the groups that share experts;
    ``group`` is this rank's. None: all ranks share them.

    The first call with a group is one of all ranks. Raises `ConfigurationError`, on every rank, if
    the groups are not of one size or are not all ranks together.
    """
    if group not in _found:
        _found[group] = _made(group) if group.size() != dist.get_world_size() else None
    return _found[group]


def _made(group: dist.ProcessGroup) -> str:
    own = dist.get_process_group_ranks(group)
    every = _told(own)
    groups = sorted({tuple(each) for each in every})
    members = [rank for each in groups for rank in each]
    if len({len(each) for each in groups}) != 1 or sorted(members) != list(range(len(every))):
        raise ConfigurationError(
            f"The experts are shared by the ranks {', '.join(str(list(each)) for each in groups)}, "
            "and data parallelism needs groups of equal size that are all ranks together: shards "
            "would have no copies whose gradients belong to theirs. Make them with "
            'init_device_mesh(device, (replicas, ranks), mesh_dim_names=("dp", "ep"))["ep"].'
        )
    name = ""
    for copies in zip(*groups, strict=True):
        made = dist.new_group(list(copies))
        if dist.get_rank() in copies:
            name = made.group_name
    return name


def _told(own: list[int]) -> list[list[int]]:
    """By rank, the ranks with which it shares experts."""
    everyone = dist.group.WORLD
    assert everyone is not None
    store, number = group_store(everyone), next(_asked)
    keys = {rank: store_key(everyone, f"shares/{number}/{rank}") for rank in range(everyone.size())}
    store.set(keys[everyone.rank()], json.dumps(own))
    wait_for(everyone, keys, _TIMEOUT, "trains sharded experts in data parallelism")
    return [json.loads(store.get(key)) for key in keys.values()]
