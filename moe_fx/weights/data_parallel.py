"""Shards in data parallelism: who averages the other parameters' gradients leaves the shards alone.

The gradient of a shard is the sum over all ranks' tokens. Data parallelism takes the mean of the
ranks' losses, so theirs is divided by the number of ranks, where it is accumulated: once, however
many backward passes a step has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from moe_fx.errors import ConfigurationError
from moe_fx.weights.expert_parameters import slots

__all__ = ["leave_to_shards", "shards_for_data_parallel"]

_WRAPPERS = ("", "_orig_mod.", "base_model.model.")
"""What a wrapper between DDP and the model (``torch.compile``, PEFT) puts before the names."""
_IGNORED = "_ddp_params_and_buffers_to_ignore"


def shards_for_data_parallel(model: nn.Module) -> set[nn.Parameter]:
    """The shards of ``model``, for what averages the gradients of all other parameters over the
    ranks; from now on those of the shards are averaged too.

    ``fully_shard(model, ignored_params=moe_fx.shards_for_data_parallel(model))``. DDP asks for
    them itself. Raises `ConfigurationError` unless the experts are shared among all ranks.
    """
    shards: dict[int, Any] = {}
    for slot in slots(model):
        if slot.unshard is None:
            continue
        ranks, world = slot.unshard.group_size, dist.get_world_size()
        if ranks != world:
            raise ConfigurationError(
                f"{slot.full_name} is shared among {ranks} of {world} ranks, and copies of a shard "
                "in other groups would be trained apart. Shard the experts over all ranks to train "
                "in data parallelism, or reduce the gradients of copies yourself."
            )
        shards[id(slot.tensor)] = slot.tensor
    for shard in shards.values():
        shard._ddp_ignored = True
        if shard.requires_grad and not _averages(shard):
            shard.register_hook(_Mean(dist.get_world_size()))
    return set(shards.values())


def leave_to_shards(model: nn.Module) -> None:
    """Let DDP, if it is to wrap ``model``, leave the shards alone."""
    present = getattr(model, _IGNORED, ())
    if not isinstance(present, _LeftToShards):
        setattr(model, _IGNORED, _LeftToShards(model, tuple(present)))


class _LeftToShards:
    """The names that DDP is to ignore. That it asks for them is how it says that it averages the
    other gradients."""

    def __init__(self, model: nn.Module, others: Iterable[str]) -> None:
        self.model = model
        self.others = others

    def __iter__(self) -> Iterator[str]:
        _refuse_accelerate()
        shards_for_data_parallel(self.model)
        names = [slot.full_name for slot in slots(self.model) if slot.unshard is not None]
        return iter([*self.others, *(prefix + name for prefix in _WRAPPERS for name in names)])


def _refuse_accelerate() -> None:
    accelerate: Any = sys.modules.get("accelerate.state")
    if accelerate is not None and accelerate.is_initialized():
        raise ConfigurationError(
            "accelerate, which transformers' Trainer trains with, wraps a model whose experts "
            "moe_fx.shard_experts has sharded in DDP, and would save rank 0's weights and "
            "optimizer state as the whole. Train it in a loop of your own, with DDP or fully_shard "
            "(docs/sharding.md), or let transformers shard the experts: from_pretrained(..., "
            'distributed_config=DistributedConfig(ep_implementation="moe_fx", ...)).'
        )


class _Mean:
    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient / self.ranks


def _averages(shard: Tensor) -> bool:
    hooks: dict[int, Any] = shard._backward_hooks or {}
    return any(isinstance(hook, _Mean) for hook in hooks.values())
