"""Shards of experts as tensors: `DTensor`, cut along the first dimension over the group's ranks.

That is what tells torch and its tools that a rank holds a part. Checkpoints (DCP) save every rank's
rows, norms are those of all ranks, and what would take a shard for the whole refuses it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moe_fx.blocks import block_of
from moe_fx.errors import ConfigurationError


def block(experts: int, group: dist.ProcessGroup) -> slice:
    """The rows of ``[experts, ...]`` that this rank keeps."""
    own = block_of(group.rank(), experts, group.size())
    return slice(own.start, own.stop)


def as_shard(
    rows: Tensor,
    experts: int,
    group: dist.ProcessGroup,
    *,
    requires_grad: bool,
    device: str | None = None,
) -> nn.Parameter:
    """``rows`` of this rank as a parameter of the shape ``[experts, ...]``. device: of rows on
    meta, the type of device that they are for. No communication."""
    kind = device or (_device_of(group) if rows.is_meta else rows.device.type)
    mesh = DeviceMesh.from_group(group, kind, mesh_dim_names=("ep",))
    shape = torch.Size((experts, *rows.shape[1:]))
    table = DTensor.from_local(
        rows.detach(), mesh, [Shard(0)], run_check=False, shape=shape, stride=rows.stride()
    )
    return nn.Parameter(table, requires_grad=requires_grad)


def _device_of(group: dist.ProcessGroup) -> str:
    """The device that a model on meta is for, as far as the group tells: "cuda" of "cuda:nccl"."""
    served = [entry.split(":", 1)[0] for entry in dist.get_backend_config(group).split(",")]
    accelerator = torch.accelerator.current_accelerator()
    preferred = accelerator.type if accelerator is not None else "cpu"
    return preferred if preferred in served else served[0]


def retire(param: nn.Parameter, shard: nn.Parameter) -> None:
    """``shard`` takes the place of ``param``: it gets its attributes, and what still holds
    ``param`` (an optimizer made before) an error for its gradient. The whole tensor is freed."""
    vars(shard).update(vars(param))
    param.grad = None
    param.data = param.data.new_empty(0)
    param.__class__ = _Retired


class _Retired(nn.Parameter):
    """A parameter that was whole before `shard_experts`."""

    @property
    def grad(self) -> Any:  # type: ignore[override]
        raise ConfigurationError(
            "This parameter of experts was replaced by its shard. Create the optimizer (and wrap "
            "or compile the model) after shard_experts, of model.parameters()."
        )


def retire_shard(shard: Any) -> None:
    """A whole parameter has taken the place of ``shard``: what still holds that (an optimizer made
    before) gets an error for its gradient."""
    shard.grad = None
    shard.__class__ = _RetiredShard


class _RetiredShard(DTensor):
    """A parameter that was a shard before `unshard_experts`."""

    @property
    def grad(self) -> Any:  # type: ignore[override]
        raise ConfigurationError(
            "This shard of experts was replaced by the whole parameter. Create the optimizer (and "
            "wrap or compile the model) after unshard_experts, of model.parameters()."
        )


def load_whole(name: str, value: Any, shard: DTensor) -> Any:
    """What ``load_state_dict`` is to load into ``shard``: of a whole tensor, this rank's rows.

    Raises `ConfigurationError` for another rank's shard, as a file that one rank saved and all
    load holds.
    """
    mesh = shard.device_mesh
    if isinstance(value, DTensor):
        theirs, mine = value.device_mesh.get_coordinate(), mesh.get_coordinate()
        if value.device_mesh.size() == mesh.size() and theirs != mine:
            raise ConfigurationError(
                f"{name} holds the rows of another rank (at {theirs} of the group, and this is "
                f"{mine}). Load the file that this rank saved; or save "
                "moe_fx.full_state_dict(model), or with torch.distributed.checkpoint, which any "
                "number of ranks can load."
            )
        return value
    if not isinstance(value, Tensor) or value.shape != shard.shape:
        return value  # what is wrong with it, torch says
    rows = block(value.shape[0], mesh.get_group())
    return DTensor.from_local(
        value[rows].detach().to(shard.device),
        mesh,
        shard.placements,
        run_check=False,
        shape=shard.shape,
        stride=shard.stride(),
    )
