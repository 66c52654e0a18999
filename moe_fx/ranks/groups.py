"""Process groups as users give them: is there one, is this rank in it, does it serve the device?"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_fx.errors import ConfigurationError


def as_group(given: Any) -> dist.ProcessGroup:
    """A process group, or that of a `DeviceMesh` of one dimension. Raises `ConfigurationError` for
    anything else, and where this rank is not in it."""
    if isinstance(given, DeviceMesh):
        return _group_of_mesh(given)
    if isinstance(given, dist.ProcessGroup):
        return given
    raise ConfigurationError(
        "expected a torch.distributed.ProcessGroup that this rank is in, such as dist.group.WORLD, "
        "or a DeviceMesh of one dimension"
    )


def _group_of_mesh(mesh: DeviceMesh) -> dist.ProcessGroup:
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        advice = "give it mesh_dim_names, as in ('dp', 'ep'), and pass mesh['ep']"
        if names is not None:
            advice = f"pass mesh[{('ep' if 'ep' in names else names[-1])!r}]"
        raise ConfigurationError(
            f"a DeviceMesh of {mesh.ndim} dimensions, {names or tuple(mesh.shape)}, holds "
            f"more than one group: {advice}, the dimension whose ranks share the experts"
        )
    if mesh.get_coordinate() is None:
        raise ConfigurationError(
            f"rank {dist.get_rank()} is not in this DeviceMesh: every rank must pass a mesh that "
            "it belongs to"
        )
    return mesh.get_group()


def require_group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    """``group``, that of a mesh, or the default one; `ConfigurationError` if this rank is in
    none."""
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigurationError(
            "Expert parallelism needs a process group, and torch.distributed is not initialised. "
            "Call torch.distributed.init_process_group() first, for example in a script started "
            "with torchrun."
        )
    if isinstance(group, DeviceMesh):
        return _group_of_mesh(group)
    chosen = dist.group.WORLD if group is None else group
    if not isinstance(chosen, dist.ProcessGroup) or dist.get_rank(chosen) < 0:
        raise ConfigurationError(
            f"Rank {dist.get_rank()} is not in the process group given for the experts. Every rank "
            "must pass the group it belongs to; torch.distributed.new_subgroups() makes one for "
            "each block of ranks."
        )
    return chosen


def check_device(device: torch.device, what: str, group: dist.ProcessGroup) -> None:
    """Raise `ConfigurationError` unless the group's backend exchanges tensors on ``device``."""
    config = dist.get_backend_config(group)  # "cpu:gloo,cuda:nccl"
    backends = dict(device.split(":", 1) for device in config.split(","))
    # Gloo lists CUDA, and crashes there (seen with torch 2.11).
    served = sorted(d for d, backend in backends.items() if backend != "gloo" or d == "cpu")
    if device.type == "meta" or device.type in served:
        return
    raise ConfigurationError(
        f"{what} is on {device.type}, and the group's backend ({config}) "
        f"exchanges tensors on {', '.join(served) or 'no device'} only. Move the model to such a "
        "device, or make the group with a backend for this one, as in "
        'init_process_group("cpu:gloo,cuda:nccl").'
    )
