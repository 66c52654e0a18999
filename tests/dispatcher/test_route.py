"""The configuration's routing fields."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

import moe_fx

EXPERTS = 8


def dispatcher(**fields: Any) -> moe_fx.MoEDispatcher:
    return moe_fx.MoEDispatcher(moe_fx.MoEDispatcherConfig(num_local_experts=EXPERTS, **fields))


def logits(tokens: int = 40) -> torch.Tensor:
    return torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(0))


def test_top_k_and_scale() -> None:
    probs, ids = dispatcher(moe_router_topk=3, scaling_factor=2.5).route(logits())
    expected = logits().softmax(-1).topk(3)
    assert torch.equal(ids, expected.indices) and torch.equal(probs, expected.values * 2.5)


def test_renormalised_weights_add_up_to_the_scale() -> None:
    probs, _ = dispatcher(moe_router_topk=3, scaling_factor=2.5).route(logits(), "sigmoid", True)
    assert torch.allclose(probs.sum(1), torch.tensor(2.5))


@pytest.mark.parametrize("fused", [True, False])
def test_bias_and_groups_select_as_deepseek_v3_does(fused: bool) -> None:
    block = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=16,
            moe_intermediate_size=8,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            n_shared_experts=1,
        )
    )
    with torch.no_grad():
        block.gate.weight.normal_()
        block.gate.e_score_correction_bias.normal_()
    x = torch.randn(40, 16)
    _, weights, selected = block.gate(x)
    d = dispatcher(
        moe_router_topk=3,
        num_groups=4,
        group_topk=2,
        expert_bias=block.gate.e_score_correction_bias,
        scaling_factor=2.5,
        is_fused=fused,
    )
    probs, ids = d.route(torch.nn.functional.linear(x, block.gate.weight), "sigmoid", True)
    order, theirs = ids.argsort(1), selected.argsort(1)
    assert torch.equal(ids.gather(1, order), selected.gather(1, theirs))
    assert torch.allclose(probs.gather(1, order), weights.gather(1, theirs), atol=1e-6)


def test_a_bias_moves_the_selection_and_not_the_weights() -> None:
    bias = torch.zeros(EXPERTS)
    bias[5] = 100.0
    probs, ids = dispatcher(moe_router_topk=1, expert_bias=bias).route(logits())
    assert (ids == 5).all() and torch.equal(probs[:, 0], logits().softmax(-1)[:, 5])


def test_logits_of_other_experts_are_refused() -> None:
    with pytest.raises(moe_fx.ConfigurationError, match=r"expected \[tokens, 8 experts\]"):
        dispatcher().route(torch.randn(3, 9))
    with pytest.raises(moe_fx.ConfigurationError, match="score='tanh'"):
        dispatcher().route(logits(), "tanh")


def test_builder_and_keywords_are_the_same() -> None:
    built = (
        moe_fx.MoEDispatcherConfig()
        .set_num_local_experts(4)
        .set_num_moe_experts(8)
        .set_moe_pad_expert_input_to_capacity(True)
        .set_moe_expert_capacity_factor(1.5)
        .set_moe_router_topk(3)
        .set_moe_grouped_gemm(True)
        .set_group_topk(2)
        .set_num_groups(4)
        .set_expert_bias(None)
        .set_scaling_factor(2.0)
        .set_is_fused(False)
        .build()
    )
    assert built == moe_fx.MoEDispatcherConfig(4, 8, True, 1.5, 3, True, 2, 4, None, 2.0, False)
