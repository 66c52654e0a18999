"""The layers of the benchmark: blocks of transformers, with weights that tell experts apart.

The ratio of exchange to compute is set by the width of an expert: a row's way over the link costs
the same whatever the width. Routing is set by the tokens and the gate's weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

ZIPF_EXPONENT = 1.0
_GUMBEL_STD = math.pi / math.sqrt(6)
_ALIGNMENT = 64
"""Widths are multiples of this."""


@dataclass(frozen=True)
class Layer:
    """What a layer is, but for the width of its experts. tokens: of each rank."""

    name: str
    title: str
    hidden: int
    num_experts: int
    top_k: int
    tokens: int
    shared_experts: int
    make: Callable[[Layer, int], nn.Module]

    def describe(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "make"}


def _qwen3(layer: Layer, width: int) -> nn.Module:
    return Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(
            hidden_size=layer.hidden,
            moe_intermediate_size=width,
            num_experts=layer.num_experts,
            num_experts_per_tok=layer.top_k,
            norm_topk_prob=True,
            experts_implementation="grouped_mm",
        )
    )


def _mixtral(layer: Layer, width: int) -> nn.Module:
    return MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=layer.hidden,
            intermediate_size=width,
            num_local_experts=layer.num_experts,
            num_experts_per_tok=layer.top_k,
            experts_implementation="grouped_mm",
        )
    )


def _deepseek(layer: Layer, width: int) -> nn.Module:
    return DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=layer.hidden,
            moe_intermediate_size=width,
            n_routed_experts=layer.num_experts,
            num_experts_per_tok=layer.top_k,
            n_shared_experts=layer.shared_experts,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            experts_implementation="grouped_mm",
        )
    )


LAYERS: dict[str, Layer] = {
    layer.name: layer
    for layer in (
        Layer("qwen3", "Qwen3-like, many small experts", 512, 16, 4, 1024, 0, _qwen3),
        Layer("mixtral", "Mixtral-like, few big experts", 1024, 8, 2, 1024, 0, _mixtral),
        Layer("deepseek", "DeepSeek-like, a shared expert", 512, 16, 4, 1024, 1, _deepseek),
    )
}


def width_for(exchange: float, fixed: float, per_width: float, ratio: float) -> int:
    """The width at which compute, ``fixed + per_width * width`` seconds, is ``exchange / ratio``
    seconds."""
    wanted = (exchange / ratio - fixed) / per_width
    return max(_ALIGNMENT, _ALIGNMENT * round(wanted / _ALIGNMENT))


def build(layer: Layer, width: int, routing: str) -> nn.Module:
    """The block, whole and in fp32; the same numbers on every rank."""
    block = layer.make(layer, width).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            fan_in = parameter.shape[-1]
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
        block.get_parameter("gate.weight").copy_(gate(layer, routing))
    return block


def tokens(layer: Layer, rank: int, routing: str) -> Tensor:
    """``[1, tokens, hidden]``, other ones on each rank: noise, and in the last feature a constant
    by which the gate favours experts."""
    generator = torch.Generator().manual_seed(1 + rank)
    found = torch.randn(1, layer.tokens, layer.hidden, generator=generator)
    found[..., -1] = 1.0
    return found


def gate(layer: Layer, routing: str) -> Tensor:
    """The gate's weights: orthogonal rows, so that logits of noise are independent and experts are
    used evenly; on the constant feature, the logarithm of each expert's share.

    Noise with the spread of a Gumbel variable makes the k largest logits a draw of k experts,
    without replacement, in about these shares.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(layer.hidden - 1, layer.num_experts, generator=generator)
    rows = torch.linalg.qr(noise).Q.t() * _GUMBEL_STD
    places = torch.randperm(layer.num_experts, generator=generator)
    if routing == "zipf":
        offsets = -ZIPF_EXPONENT * torch.log1p(places.float())
    elif routing == "uniform":
        offsets = torch.zeros(layer.num_experts)
    else:
        raise ValueError(f"routing {routing!r}: expected 'uniform' or 'zipf'")
    return torch.cat([rows, offsets[:, None]], 1)


def selection(block: nn.Module, x: Tensor) -> Tensor:
    """``[tokens, k]``: the experts that the block's own router selects."""
    gate = block.get_submodule("gate")
    with torch.no_grad():
        return gate(x.reshape(-1, x.shape[-1]))[2]


def shares(ids: Tensor, num_experts: int) -> list[float]:
    """Each expert's share of the pairs of tokens and experts."""
    return (torch.bincount(ids.reshape(-1), minlength=num_experts) / ids.numel()).tolist()
