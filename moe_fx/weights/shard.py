"""Keep one rank's experts, compute as if all were here: the *gathered* program.

`shard_experts` cuts every expert parameter along its first dimension and puts the all-gather of the
shards over the group in its place: reading the parameter gives the whole tensor. So the model means
what it meant, in eager and under any compiler, and memory is what is saved at first.
``torch.compile(model, backend="moe_fx")`` then cancels the gathers and exchanges tokens instead.

One rule makes this safe whatever the experts' code does with its weights: *entering* the module
that holds them gathers each once, *leaving* drops them. A loop over the experts that were hit reads
its weights a different number of times on each rank; a gather a read would hang.

The gradient of a shard is the reduce-scatter of the whole tensor's gradients: summed, not averaged,
over the ranks; in data parallelism their mean (`moe_fx.weights.data_parallel`). Autograd keeps the
gathered weights until backward; gradient checkpointing, which gathers them again, does not, and
moe_fx's compiled graphs have none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moe_fx.ranks.groups import require_group
from moe_fx.weights.checkpoint import assign, read
from moe_fx.weights.expert_parameters import Slot, expert_parameters, likely_experts, slots
from moe_fx.weights.pretrained import adapt, read_whole, readapt
from moe_fx.weights.shards import as_shard, block, retire, retire_shard
from moe_fx.weights.unshard import uninstall
from moe_fx.weights.whole import meet

__all__ = ["expert_parameter_bytes", "shard_experts", "unshard_experts"]

_TIMEOUT = 300.0


def shard_experts(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    *,
    params: Iterable[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Keep this rank's block of every expert parameter; return the same model, same meaning.

    Every rank of the group calls this, and from then on runs the model together with the others.
    Rank r of W keeps the experts from ``r * n`` up to ``(r + 1) * n``, n being ``E / W`` rounded
    up: the last ranks may have fewer, or none. ``[E, ...]`` becomes ``[n, ...]``, a copy, so that
    the whole tensor is freed. In the module's parameters and its
    state dict it is a `DTensor`, under the name it had; to read the attribute gathers the whole.
    These are new `Parameter` objects (``requires_grad`` and ties stay): create the optimizer, wrap
    and compile afterwards. What other tools make of shards: docs/sharding.md.

    group: the ranks that share the experts; default: all ranks.
    params: glob patterns on full parameter names (``"*.experts.w[123]"``), or the names that
        ``moe_fx.explain(model, ...).expert_parameters`` has proved. Default: every direct parameter
        of a module whose parameters all have the same first size E, one of them being
        three-dimensional, if the module's ``num_experts`` is E or its class or path says "expert".
    checkpoint: a safetensors file, or a directory of them, to load the weights from; of the experts
        only this rank's are read. A transformers model's is read with transformers' own
        conversions; any other must have the names of ``model.state_dict()``. The model may be on
        the meta device.

    A model that is already sharded over this group comes back unchanged, but for ``checkpoint``.
    Raises `ConfigurationError`, before anything is changed, if there is no process group, this rank
    is not in it, its backend cannot serve the model's device, no expert parameter is found, one is
    not a plain tensor, or the checkpoint does not fit the model.
    """
    group = require_group(group)
    targets = expert_parameters(model, group, params)
    weights = {} if checkpoint is None else read(model, group, targets, Path(checkpoint))
    _cut(targets, group)
    assign(model, weights, group)
    adapt(model)
    return model


def _cut(targets: Sequence[Slot], group: dist.ProcessGroup) -> None:
    """Each target, whole, becomes this rank's shard, and reads as the whole."""
    shards: dict[int, nn.Parameter] = {}  # a tied parameter stays one
    for target in targets:
        param: Any = target.tensor
        if id(param) not in shards:
            rows = param.data[block(param.shape[0], group)]
            rows = rows.clone(memory_format=torch.contiguous_format)
            shards[id(param)] = as_shard(
                rows, param.shape[0], group, requires_grad=param.requires_grad
            )
            retire(param, shards[id(param)])
        target.module._parameters[target.name] = shards[id(param)]
    read_whole(targets, group)


def unshard_experts(model: nn.Module) -> nn.Module:
    """The experts whole again on every rank: `shard_experts` undone; return the same model.

    Every rank of the group calls this; a table at a time is gathered. These are new `Parameter`
    objects (``requires_grad`` and ties stay), without gradients: create the optimizer anew. A model
    that is not sharded comes back unchanged. Raises `RanksDiffer` where a rank does not call it.
    """
    sharded = [slot for slot in slots(model) if slot.unshard is not None]
    if not sharded:
        return model
    meet("make experts whole (moe_fx.unshard_experts)", _TIMEOUT)
    shards: dict[int, Any] = {id(slot.tensor): slot.tensor for slot in sharded}  # a tied one once
    whole = {
        key: nn.Parameter(shard.detach().full_tensor(), requires_grad=shard.requires_grad)
        for key, shard in shards.items()
    }
    for slot in sharded:
        slot.module._parameters[slot.name] = whole[id(slot.tensor)]
    for shard in shards.values():
        retire_shard(shard)
    for module in {id(slot.module): slot.module for slot in sharded}.values():
        uninstall(module)
    readapt(model)
    return model


def expert_parameter_bytes(model: nn.Module) -> tuple[int, int]:
    """(bytes of expert parameters this rank holds, bytes of all ranks' together).

    Equal for a model that is not sharded; its expert parameters are then those that `shard_experts`
    finds by default.
    """
    held: dict[int, int] = {}
    whole: dict[int, int] = {}
    for slot in slots(model):
        if slot.unshard is not None:
            table: Any = slot.tensor
            held[id(table)] = table.to_local().nbytes
            whole[id(table)] = table.numel() * table.element_size()
    for slot in likely_experts(model):
        held[id(slot.tensor)] = whole[id(slot.tensor)] = slot.tensor.nbytes
    return sum(held.values()), sum(whole.values())
