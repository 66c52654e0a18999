"""Twelve transformers families as tiny whole causal language models with random, seeded weights.

Each `Family` states what a correct reading of its graph must find, taken from the family's modeling
file (transformers 5.23) for the configuration given here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["FAMILIES", "Family", "build", "cast", "randomise", "token_ids"]

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_DENSE_AND_MOE: dict[str, Any] = {"intermediate_size": 64, "moe_intermediate_size": 32}
_LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


@dataclass(frozen=True)
class Family:
    """A model family, its tiny configuration, and what there is to find in it.

    moe_layers: layers with experts; the others, if any, are dense. score, select_bias, num_groups,
    topk_group, renormalise, scale: as in `moe_fx.Router`; a softmax over the selected logits
    renormalises. shared_expert: every token passes through one more expert, which is added.
    """

    name: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    config_kwargs: Mapping[str, Any] = field(compare=False)
    moe_layers: int = 2
    num_experts: int = 8
    top_k: int = 2
    score: str = "softmax"
    select_bias: bool = False
    num_groups: int = 1
    topk_group: int = 1
    renormalise: bool = True
    scale: float = 1.0
    shared_expert: bool = False


_ALL = (
    Family(
        "mixtral",
        hf.MixtralConfig,
        hf.MixtralForCausalLM,
        {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    Family(
        "qwen2_moe",
        hf.Qwen2MoeConfig,
        hf.Qwen2MoeForCausalLM,
        {
            **_DENSE_AND_MOE,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 32,
        },
        renormalise=False,
        shared_expert=True,
    ),
    Family(
        "qwen3_moe",
        hf.Qwen3MoeConfig,
        hf.Qwen3MoeForCausalLM,
        {
            **_DENSE_AND_MOE,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,  # as Qwen3-30B-A3B has it; the class's default is False
        },
    ),
    Family(
        "olmoe",
        hf.OlmoeConfig,
        hf.OlmoeForCausalLM,
        {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
        renormalise=False,
    ),
    Family(
        "deepseek_v2",
        hf.DeepseekV2Config,
        hf.DeepseekV2ForCausalLM,
        {
            **_DENSE_AND_MOE,
            **_LATENT_ATTENTION,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.5,
        },
        renormalise=False,  # the router ignores norm_topk_prob
        scale=1.5,
        shared_expert=True,
    ),
    Family(
        "deepseek_v3",
        hf.DeepseekV3Config,
        hf.DeepseekV3ForCausalLM,
        {
            **_DENSE_AND_MOE,
            **_LATENT_ATTENTION,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
        score="sigmoid",
        select_bias=True,
        num_groups=4,
        topk_group=2,
        scale=2.5,
        shared_expert=True,
    ),
    Family(
        "glm4_moe",
        hf.Glm4MoeConfig,
        hf.Glm4MoeForCausalLM,
        {
            **_DENSE_AND_MOE,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "head_dim": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        },
        score="sigmoid",
        select_bias=True,
        num_groups=4,
        topk_group=2,
        shared_expert=True,
    ),
    Family(
        "gpt_oss",
        hf.GptOssConfig,
        hf.GptOssForCausalLM,
        {
            "intermediate_size": 32,
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
        },
    ),
    Family(
        "ernie4_5_moe",
        hf.Ernie4_5_MoeConfig,
        hf.Ernie4_5_MoeForCausalLM,
        {
            **_DENSE_AND_MOE,
            "num_hidden_layers": 3,
            "moe_layer_start_index": 1,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
        },
        select_bias=True,
        shared_expert=True,
    ),
    Family(
        "granitemoe",
        hf.GraniteMoeConfig,
        hf.GraniteMoeForCausalLM,
        {
            "intermediate_size": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "attention_multiplier": 0.25,
        },
    ),
    Family(
        "jamba",
        hf.JambaConfig,
        hf.JambaForCausalLM,
        {
            "intermediate_size": 32,
            "num_hidden_layers": 3,  # mamba + experts, mamba + dense, attention + experts
            "attn_layer_period": 3,
            "attn_layer_offset": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 0,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            # The same scan compiled as in eager, to the last bit. A graph holds for one sequence
            # length (either scan sees to that) and any batch. use_mamba_kernels has no effect.
            "use_associative_scan": False,
        },
        renormalise=False,
    ),
    Family(
        "minimax",
        hf.MiniMaxConfig,
        hf.MiniMaxForCausalLM,
        {
            "intermediate_size": 32,
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "block_size": 32,
        },
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def build(
    name: str,
    impl: str = "grouped_mm",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """The family's model in eval mode and its configuration; ``changes``: to that.

    ``impl`` is the spelling of the experts: "grouped_mm" or "batched_mm". The weights of one seed
    are the same numbers in every dtype, up to rounding.
    """
    family = FAMILIES[name]
    kwargs = {**_COMMON, **family.config_kwargs, "experts_implementation": impl, **changes}
    config = family.config_class(**kwargs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.model_class(config)
    randomise(model, torch.Generator().manual_seed(seed))
    cast(model, dtype)
    return model.eval(), config


def token_ids(config: PreTrainedConfig, batch: int, seq: int, seed: int = 0) -> Tensor:
    """Random ids ``[batch, seq]`` (int64)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (batch, seq), generator=generator)


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Weights that keep activations around one, spread the routing, and tell experts apart."""
    biases = [(n, b) for n, b in model.named_buffers() if n.endswith("bias")]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *biases]:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(_value(model, name, tensor, noise))


def _value(model: nn.Module, name: str, tensor: Tensor, noise: Tensor) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf.endswith("bias"):
        return 0.1 * noise
    if isinstance(module, nn.Embedding):
        return noise
    if tensor.ndim == 1 or leaf == "A_log":  # norms and others that have a meaningful default
        return tensor + 0.1 * noise
    fan_in = tensor.shape[-2 if getattr(module, "is_transposed", False) else -1]
    gain = 2.0 if owner.endswith((".gate", ".router")) or leaf == "down_proj" else 1.0
    return gain * noise / fan_in**0.5


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """As a checkpoint loads: buffers outside the state dict stay, and so does what the family keeps
    in float32 (``_keep_in_fp32_modules`` is about float16 only)."""
    keep = model._keep_in_fp32_modules_strict or ()
    kept = re.compile("|".join(rf"(^|\.){re.escape(part)}(\.|$)" for part in keep) or r"(?!)")
    saved = model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and name in saved and not kept.search(name):
            tensor.data = tensor.data.to(dtype)
