"""How vLLM's layers do each step of an opened layer. Platforms with layers of their own put a
subclass in `ops.steps` (`moe_fx.integrations.vllm_ascend`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
from vllm.platforms import current_platform


class Steps:
    """``layer``: vLLM's ``MoERunner``."""

    def misfit(self, layer: Any) -> str:
        """Why a layer can't be taken apart, or ""."""
        parallel = layer.moe_config.moe_parallel_config
        if parallel.enable_eplb:
            return "its experts are balanced over ranks while it runs (EPLB)"
        if layer.routed_experts.quant_method.is_monolithic:
            return "its kernel routes tokens itself"
        if layer.routed_experts.apply_router_weight_on_input:
            return "its routing weights multiply tokens, not the experts' results"
        if isinstance(layer.router, ZeroExpertRouter):
            return "its router computes experts that do nothing"
        if layer._fse_fuse_gate:
            return "its router scores the shared expert too"
        if layer.moe_config.use_deferred_moe_finalize:
            return "its results are summed by what reads them"
        return ""

    def may_reduce(self, layer: Any) -> bool:
        """Whether vLLM may take the routed result for summed over tensor-parallel ranks."""
        return bool(layer._fused_output_is_reduced)

    def route(
        self, layer: Any, hidden_states: Tensor, router_logits: Tensor, input_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Weights and ids ``[T, K]``."""
        if layer.gate is not None:
            router_logits, _ = layer.gate(hidden_states)
        weights, ids = layer.router.select_experts(
            hidden_states=hidden_states,
            router_logits=router_logits,
            topk_indices_dtype=torch.int32,
            input_ids=input_ids,
        )
        return weights, ids

    def experts(self, layer: Any, rows: Tensor, counts: Tensor, first: int) -> Tensor:
        """``rows [R, H]`` of the experts of this rank from the ``first`` on, ``counts`` of each."""
        layer.routed_experts._ensure_moe_quant_config_init()
        run = layer.routed_experts.forward_modular
        if current_platform.is_cpu():  # whose kernels take ids of local experts, and only those
            results = torch.zeros_like(rows)
            if own := int(counts.sum()):
                ids, weights = row_ids(rows[:own], counts, first, -1)
                results[:own] = run(x=rows[:own].contiguous(), topk_weights=weights, topk_ids=ids)
            return results
        config = layer.moe_config
        start = config.ep_rank * config.num_local_experts
        nobody = (start - 1) % config.num_experts  # another rank's, which kernels skip
        ids, weights = row_ids(rows, counts, start + first, nobody)
        result: Tensor = run(x=rows.contiguous(), topk_weights=weights, topk_ids=ids)
        return result

    def shared(self, layer: Any, x: Tensor) -> Tensor:
        result: Tensor = layer.shared_experts._layer(x)
        return result


def row_ids(rows: Tensor, counts: Tensor, first: int, nobody: int) -> tuple[Tensor, Tensor]:
    """``[R, 1]`` the expert of each row, counted from ``first``, and unit weights. nobody: the id
    of the rows past the sum of ``counts``."""
    at = torch.arange(len(rows), device=rows.device)
    ids = torch.searchsorted(counts.cumsum(0), at, right=True)
    ids = torch.where(ids < len(counts), ids + first, nobody)
    weights = torch.ones((len(rows), 1), device=rows.device, dtype=torch.float32)
    return ids.to(torch.int32).view(-1, 1), weights
