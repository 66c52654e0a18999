"""vLLM's process groups: ``MoEAlltoAllSeqOverLapDispatcher(config, **groups())``."""

from __future__ import annotations

import torch.distributed as dist

from moe_fx.errors import ConfigurationError

__all__ = ["groups"]


def groups() -> dict[str, dist.ProcessGroup]:
    """``{"ep_group": ...}``, as vLLM has set it up. `ConfigurationError` if it has not."""
    try:
        from vllm.distributed.parallel_state import get_ep_group
    except ImportError as error:
        raise ConfigurationError(f"vLLM is not installed here: {error}") from error
    try:
        group = get_ep_group()
    except AssertionError as error:
        raise ConfigurationError(
            "vLLM has no expert-parallel group yet: call this from a model that vLLM runs, with "
            f"enable_expert_parallel ({error})"
        ) from error
    return {"ep_group": group.device_group}
