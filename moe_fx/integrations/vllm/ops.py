"""``torch.ops.moe_fx_vllm.*``: the steps of vLLM's MoE layers, each on its own.

| op | meaning |
|---|---|
| ``route`` | the layer's router: weights and ids of the experts of each token |
| ``experts`` | the layer's experts on rows sorted by expert, by its quantisation method |
| ``cpu_experts`` | the same where vLLM's graph has the layer's weights: ``_C.cpu_fused_moe`` |
| ``shared`` | the layer's shared expert |
| ``reduced`` | the routed result, summed over ranks if vLLM takes it for summed |
| ``own_tokens`` / ``place_tokens`` | a rank's part of tokens that several have / the way back |

Experts get every row with one id and weight 1, so that whatever vLLM's kernels do with a weight
format happens unchanged. A layer is looked up by name when the op runs, as vLLM's own ops do.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.fused_moe.runner import moe_runner
from vllm.utils.torch_utils import direct_register_custom_op

from moe_fx.integrations.vllm.steps import Steps, row_ids

__all__ = ["NAMESPACE", "steps"]

NAMESPACE = "moe_fx_vllm"
_LIBRARY = Library(NAMESPACE, "FRAGMENT")
LayerName = moe_runner._layer_name_type
steps = Steps()


def _layer(name: Any) -> Any:
    return moe_runner.get_layer_from_name(moe_runner._resolve_layer_name(name))


def _route(
    hidden_states: Tensor,
    router_logits: Tensor,
    input_ids: Tensor | None,
    layer_name: LayerName,  # type: ignore[valid-type]
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """``[T, K]`` weights in float32 and ids in int32."""
    layer = _layer(layer_name)
    weights, ids = steps.route(layer, hidden_states, router_logits, input_ids)
    if ids.shape[1] != top_k:
        raise RuntimeError(
            f"moe_fx_vllm::route: {layer.layer_name} selects {ids.shape[1]} experts, its "
            f"configuration said {top_k}"
        )
    return weights.to(torch.float32), ids.to(torch.int32)


def _route_fake(
    hidden_states: Tensor,
    router_logits: Tensor,
    input_ids: Tensor | None,
    layer_name: LayerName,  # type: ignore[valid-type]
    top_k: int,
) -> tuple[Tensor, Tensor]:
    sizes = (hidden_states.shape[0], top_k)
    return (
        hidden_states.new_empty(sizes, dtype=torch.float32),
        hidden_states.new_empty(sizes, dtype=torch.int32),
    )


def _experts(
    rows: Tensor,
    counts: Tensor,
    first: int,
    layer_name: LayerName,  # type: ignore[valid-type]
) -> Tensor:
    """``rows [R, H]``: of the experts of this rank from the ``first`` on, ``counts`` of each."""
    return steps.experts(_layer(layer_name), rows, counts, first)


def _experts_fake(
    rows: Tensor,
    counts: Tensor,
    first: int,
    layer_name: LayerName,  # type: ignore[valid-type]
) -> Tensor:
    return torch.empty_like(rows)


def _cpu_experts(
    rows: Tensor,
    counts: Tensor,
    first: int,
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    act: str,
    isa: str,
) -> Tensor:
    """As ``experts``, with vLLM's packed weights of this rank's experts."""
    results = torch.zeros_like(rows)
    if own := int(counts.sum()):
        ids, weights = row_ids(rows[:own], counts, first, -1)
        torch.ops._C.cpu_fused_moe(
            results[:own],
            rows[:own].contiguous(),
            w13,
            w2,
            w13_bias,
            w2_bias,
            weights,
            ids,
            False,
            act,
            isa,
        )
    return results


def _cpu_experts_fake(
    rows: Tensor,
    counts: Tensor,
    first: int,
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    act: str,
    isa: str,
) -> Tensor:
    return torch.empty_like(rows)


def _shared(x: Tensor, layer_name: LayerName) -> Tensor:  # type: ignore[valid-type]
    return steps.shared(_layer(layer_name), x)


def _shared_fake(x: Tensor, layer_name: LayerName) -> Tensor:  # type: ignore[valid-type]
    return torch.empty_like(x)


def _reduced(result: Tensor, layer_name: LayerName) -> Tensor:  # type: ignore[valid-type]
    """vLLM sums routed results over tensor-parallel ranks after the layer, unless the layer's
    kernel says that it has."""
    if not _layer(layer_name)._fused_output_is_reduced:
        return result.clone()
    summed: Tensor = tensor_model_parallel_all_reduce(result)
    return summed


def _reduced_fake(result: Tensor, layer_name: LayerName) -> Tensor:  # type: ignore[valid-type]
    return torch.empty_like(result)


def _own_tokens(tokens: Tensor, world_size: int, rank: int) -> Tensor:
    """``[ceil(T / W), ...]``, the last ranks' filled up with zeros."""
    each = -(-tokens.shape[0] // world_size)
    own = tokens[rank * each : (rank + 1) * each]
    padded = tokens.new_zeros((each, *tokens.shape[1:]))
    padded[: len(own)] = own
    return padded


def _own_tokens_fake(tokens: Tensor, world_size: int, rank: int) -> Tensor:
    each = (tokens.shape[0] + world_size - 1) // world_size
    return tokens.new_empty((each, *tokens.shape[1:]))


def _place_tokens(own: Tensor, like: Tensor, world_size: int, rank: int) -> Tensor:
    """The results of ``own_tokens``, among zeros in the place of ``like [T, H]``; of its dtype."""
    first = rank * len(own)
    placed = torch.zeros_like(like)
    placed[first : first + len(own)] = own[: max(0, len(like) - first)]
    return placed


def _place_tokens_fake(own: Tensor, like: Tensor, world_size: int, rank: int) -> Tensor:
    return torch.empty_like(like)


for _name, _kernel, _fake in (
    ("route", _route, _route_fake),
    ("experts", _experts, _experts_fake),
    ("cpu_experts", _cpu_experts, _cpu_experts_fake),
    ("shared", _shared, _shared_fake),
    ("reduced", _reduced, _reduced_fake),
    ("own_tokens", _own_tokens, _own_tokens_fake),
    ("place_tokens", _place_tokens, _place_tokens_fake),
):
    direct_register_custom_op(_name, _kernel, fake_impl=_fake, target_lib=_LIBRARY)
