"""Shards in data parallelism: who averages the other parameters' gradients leaves the shards alone.

The gradient of a shard is the sum over the tokens of all ranks that share the experts. Data
parallelism takes the mean of the ranks' losses, so theirs is divided by the number of all ranks,
where it is accumulated. Where only some ranks share the experts, others hold copies of the same
shard: the gradients of copies are summed first (`replicas`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_fx.compat import resolve_group
from moe_fx.errors import ConfigurationError
from moe_fx.weights.expert_parameters import slots
from moe_fx.weights.replicas import replicas

__all__ = ["leave_nothing", "leave_to_shards", "saves_shards", "shards_for_data_parallel"]

_WRAPPERS = ("", "_orig_mod.", "base_model.model.")
"""What a wrapper between DDP and the model (``torch.compile``, PEFT) puts before the names."""
_IGNORED = "_ddp_params_and_buffers_to_ignore"


def shards_for_data_parallel(model: nn.Module) -> set[nn.Parameter]:
    """The shards of ``model``, for what averages the gradients of all other parameters over the
    ranks; from now on those of the shards are averaged too.

    ``fully_shard(model, ignored_params=moe_fx.shards_for_data_parallel(model))``. DDP asks for
    them itself. Every rank calls this. Raises `ConfigurationError` where the experts are shared by
    groups of ranks that are not of equal size, or are not all ranks together.
    """
    shards: dict[int, Any] = {}
    for slot in slots(model):
        if slot.unshard is None:
            continue
        shard: Any = slot.tensor
        shards[id(shard)] = shard
        shard._ddp_ignored = True
        if shard.requires_grad and not _averages(shard):
            copies = replicas(resolve_group(slot.unshard.group_name))
            shard.register_hook(_Mean(dist.get_world_size(), copies))
    return set(shards.values())


def leave_to_shards(model: nn.Module) -> None:
    """Let DDP, if it is to wrap ``model``, leave the shards alone."""
    present = getattr(model, _IGNORED, ())
    if not isinstance(present, _LeftToShards):
        setattr(model, _IGNORED, _LeftToShards(model, tuple(present)))


def leave_nothing(model: nn.Module) -> None:
    """`leave_to_shards` undone."""
    present = getattr(model, _IGNORED, None)
    if isinstance(present, _LeftToShards):
        setattr(model, _IGNORED, list(present.others))


def saves_shards(model: nn.Module) -> None:
    """Who trains ``model`` with accelerate saves shards as what they are."""
    for module in model.modules():  # a wrapper (PEFT) may be around it
        left = getattr(module, _IGNORED, None)
        if isinstance(left, _LeftToShards):
            left.saved_right = True


class _LeftToShards:
    """The names that DDP is to ignore. That it asks for them is how it says that it averages the
    other gradients."""

    def __init__(self, model: nn.Module, others: Iterable[str]) -> None:
        self.model = model
        self.others = others
        self.saved_right = False

    def __iter__(self) -> Iterator[str]:
        if not self.saved_right:
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
            "optimizer state as the whole. Use moe_fx.integrations.trainer.ExpertParallelTrainer, "
            "or a loop of your own with DDP or fully_shard (docs/sharding.md), or let transformers "
            "shard the experts: from_pretrained(..., "
            'distributed_config=DistributedConfig(ep_implementation="moe_fx", ...)).'
        )


class _Mean:
    """copies: the group of the ranks that hold the same shard; None: no other does."""

    def __init__(self, ranks: int, copies: str | None) -> None:
        self.ranks, self.copies = ranks, copies

    def __call__(self, gradient: Any) -> Tensor:
        if self.copies is None:
            return gradient / self.ranks  # type: ignore[no-any-return]
        rows = (gradient.to_local() / self.ranks).contiguous()
        dist.all_reduce(rows, group=resolve_group(self.copies))
        return DTensor.from_local(
            rows,
            gradient.device_mesh,
            gradient.placements,
            run_check=False,
            shape=gradient.shape,
            stride=gradient.stride(),
        )


def _averages(shard: Tensor) -> bool:
    hooks: dict[int, Any] = shard._backward_hooks or {}
    return any(isinstance(hook, _Mean) for hook in hooks.values())
