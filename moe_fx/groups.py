"""Process groups as users give them: is there one, is this rank in it, does it serve the device?"""

from __future__ import annotations

import torch
import torch.distributed as dist

from moe_fx.errors import ConfigurationError


def require_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """``group``, or the default one; `ConfigurationError` if this rank is in none."""
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigurationError(
            "Expert parallelism needs a process group, and torch.distributed is not initialised. "
            "Call torch.distributed.init_process_group() first, for example in a script started "
            "with torchrun."
        )
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
