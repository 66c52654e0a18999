"""Where the experts of vLLM's layers are and which tokens a rank has, read from the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from vllm.distributed import get_ep_group, get_tp_group
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from moe_fx.integrations.vllm import ops

LINEAR = "linear"
"""vLLM's placement in which rank ``r`` has the experts from ``r * E / W`` on."""


@dataclass(frozen=True)
class Layout:
    """What all MoE layers of a model have in common.

    tensor_parallel: ranks that have the same tokens; different_tokens: the ranks of the group do
    not all have the same; kernels_exchange: where they have not, kernels dispatch and combine
    themselves; may_be_reduced: vLLM may take routed results for summed. hidden: features of the
    tokens that meet the experts.
    """

    num_experts: int
    top_k: int
    hidden: int
    world_size: int
    rank: int
    group_name: str
    tensor_parallel: int
    tensor_rank: int
    different_tokens: bool
    kernels_exchange: bool
    may_be_reduced: bool

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.world_size


class Unsupported(Exception):
    """Why the layers are left alone."""


def layout(layers: Mapping[str, Any]) -> Layout:
    """Of vLLM's ``static_forward_context``: all layers, by name. Raises `Unsupported`."""
    runners = {name: layer for name, layer in layers.items() if isinstance(layer, MoERunner)}
    if not runners:
        raise Unsupported("vLLM has registered no MoE layer for this graph")
    found: dict[Layout, str] = {}
    for name, runner in runners.items():
        found.setdefault(_of(name, runner), name)
    if len(found) > 1:
        (one, its), (other, others) = list(found.items())[:2]
        raise Unsupported(f"MoE layers differ: {its} has {one}, {others} has {other}")
    return next(iter(found))


def _of(name: str, runner: Any) -> Layout:
    config = runner.moe_config
    parallel = config.moe_parallel_config
    misfit = ops.steps.misfit(runner)
    reasons = {
        "expert parallelism is off (enable_expert_parallel)": not parallel.use_ep,
        "its tokens are sharded by sequence": parallel.is_sequence_parallel,
        "it has prefill context parallelism": parallel.pcp_size > 1,
        f"{config.num_experts} experts are not a multiple of {parallel.ep_size} ranks": (
            config.num_experts % max(1, parallel.ep_size) != 0
        ),
        f"its experts are placed {runner.expert_placement_strategy!r}, not {LINEAR!r}": (
            runner.expert_placement_strategy != LINEAR
        ),
        "it has LoRA": config.is_lora_enabled,
        misfit: misfit != "",
    }
    for reason, holds in reasons.items():
        if holds:
            raise Unsupported(f"{name}: {reason}")
    group: dist.ProcessGroup = get_ep_group().device_group
    tensor_parallel = get_tp_group()
    return Layout(
        num_experts=config.num_experts,
        top_k=config.experts_per_token,
        hidden=config.hidden_dim,
        world_size=group.size(),
        rank=group.rank(),
        group_name=group.group_name,
        tensor_parallel=tensor_parallel.world_size,
        tensor_rank=tensor_parallel.rank_in_group,
        different_tokens=parallel.dp_size > 1,
        kernels_exchange=runner.routed_experts.quant_method.moe_kernel is not None,
        may_be_reduced=ops.steps.may_reduce(runner),
    )
