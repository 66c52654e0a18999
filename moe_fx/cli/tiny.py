"""Small transformers models made from their config classes: for the demo, the CLI and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_fx.errors import ConfigurationError
from moe_fx.suggest import did_you_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_HIDDEN, _EXPERT_WIDTH, _EXPERTS, _TOP_K = 128, 64, 16, 4

# transformers' names for the same few sizes differ from family to family.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model"), _HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "shared_expert_intermediate_size"), _HIDDEN),
    **dict.fromkeys(("moe_intermediate_size", "expert_intermediate_size"), _EXPERT_WIDTH),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"),
        _TOP_K,
    ),
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
}


def require_transformers() -> None:
    """Raise `ConfigurationError`, saying what to install, if transformers cannot be imported."""
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise ConfigurationError(f"transformers cannot be imported: {error}.") from error
        raise ConfigurationError(
            "This needs transformers, which is not installed: pip install 'moe-fx[hf]'."
        ) from None


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """The config of a family (``qwen3_moe``, ``deepseek_v3``, …) with small sizes.

    Raises `ConfigurationError` for a family transformers does not know.
    """
    require_transformers()
    from transformers import AutoConfig

    try:
        default = AutoConfig.for_model(model_type)
    except ValueError:
        raise ConfigurationError(
            f"transformers has no model type {model_type!r}. {_similar(model_type)}Examples with "
            "MoE layers: qwen3_moe, deepseek_v3, mixtral, gpt_oss, olmoe, glm4_moe."
        ) from None
    known = default.to_dict()
    sizes = {name: size for name, size in _SIZES.items() if known.get(name) is not None}
    if "qk_rope_head_dim" in sizes:  # latent attention: the rotary part is the head
        sizes["head_dim"] = sizes["qk_rope_head_dim"]
    if "first_k_dense_replace" in sizes:  # still two layers with experts
        sizes["num_hidden_layers"] += sizes["first_k_dense_replace"]
    return AutoConfig.for_model(model_type, **(sizes | overrides))


def tiny_model(model_type: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A causal language model of that family in evaluation mode, with seeded weights.

    Raises `ConfigurationError` if transformers has none, or not with these ``overrides``.
    """
    config = tiny_config(model_type, **overrides)
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigurationError(
            f"transformers has no causal language model of type {model_type!r}. Write a function "
            "that returns the model and its arguments, and explain that."
        )
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ConfigurationError(f"transformers refuses to make a {model_type}: {error}") from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # larger than the initialisation, so that experts matter
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def _similar(model_type: str) -> str:
    from transformers import CONFIG_MAPPING

    return did_you_mean(model_type, CONFIG_MAPPING.keys())
