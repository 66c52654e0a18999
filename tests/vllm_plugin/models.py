"""Tiny checkpoints with random weights, large enough that every expert shows in the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf

_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3_moe": (hf.Qwen3MoeConfig, hf.Qwen3MoeForCausalLM, {"num_experts": 8}),
    "qwen2_moe": (
        hf.Qwen2MoeConfig,
        hf.Qwen2MoeForCausalLM,
        {"num_experts": 8, "shared_expert_intermediate_size": 64},
    ),
    "glm4_moe": (
        hf.Glm4MoeConfig,
        hf.Glm4MoeForCausalLM,
        {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 0},
    ),
}


def write(kind: str, folder: Path) -> Path:
    """``folder / kind``, a checkpoint in float32."""
    config_class, model_class, fields = MODELS[kind]
    torch.manual_seed(0)
    config = config_class(
        **_COMMON, **fields, dtype="float32", architectures=[model_class.__name__]
    )
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder / kind)
    return folder / kind
