"""A whole model of every transformers family that has experts: two layers, made from the family's
configuration class and one table of small sizes, with random, seeded weights.

Where a family is multimodal it is its language model. `tests/models.py` has hand-written
configurations of twelve families, with what there is to find in each.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.families import BLOCKS, SIZES, Block, configuration, configure, modeling
from tests.models import cast, randomise

__all__ = ["MODELS", "build", "effect_of_experts", "inputs", "moe_layers", "result"]

_LAYERS = 2
_SIZES: dict[str, Any] = {
    **SIZES,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), _LAYERS),
    **dict.fromkeys(("num_sparse_encoder_layers", "num_sparse_decoder_layers"), _LAYERS),
    "n_layers": _LAYERS,
    **dict.fromkeys(("mamba_d_state", "mamba_dt_rank"), 4),
    **dict.fromkeys(("unpadded_vocab_size", "vocab_size_per_layer_input"), 128),
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 0,
    # Experts in every layer.
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 0),
    **dict.fromkeys(("expert_layer_period", "moe_layer_freq"), 1),
    **dict.fromkeys(("encoder_sparse_step", "decoder_sparse_step"), 1),
    **dict.fromkeys(("expert_layer_offset", "num_hash_layers"), 0),
    "mlp_layer_types": ["sparse"] * _LAYERS,
}
"""As `tests.families.SIZES`."""


def _rotary(*section: int, **further: float) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)}
    return {"rope_parameters": rope | further}


_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}  # linear takes long to capture
_OWN: dict[str, Mapping[str, Any]] = {
    "bailing_hybrid": _HYBRID,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "ernie4_5_vl_moe": _rotary(3, 3, 2),
    "glm4v_moe": _rotary(2, 3, 3, partial_rotary_factor=1.0),
    "flint": {"mlp_only_layers": []},
    "glm5_next": {"qk_rope_head_dim": 0, **_HYBRID},
    "kimi_linear": _HYBRID,
    "hy_v4_vl": _rotary(2, 3, 3),
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"layer_types": ["linear_attention", "moe", "full_attention", "moe"]},
    "nllb_moe": {"pad_token_id": 1, "decoder_start_token_id": 2},
    "step3p7": {"pad_token_id": 1},
    "switch_transformers": {"pad_token_id": 0, "decoder_start_token_id": 0},
    "vitpose_backbone": {"image_size": (32, 32), "patch_size": (8, 8)},
}
_ENDINGS = (
    "ForCausalLM",
    "ForConditionalGeneration",
    "ForTokenClassification",
    "Model",
    "Backbone",
)

MODELS: tuple[str, ...] = tuple(label for label in BLOCKS if label != "bamba")
"""Labels of `tests.families.BLOCKS`."""


def build(
    label: str, impl: str = "grouped_mm", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model in eval mode. ``impl`` is "grouped_mm" or "batched_mm"; families that do not let
    one choose ignore it."""
    block = BLOCKS[label]
    config = configure(block, _SIZES, _own(block) | dict(_OWN.get(label, {})))
    if block.decorated:
        config._experts_implementation_internal = impl
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model_class(block)(config)
        for buffer in model.buffers():
            if buffer.dtype == torch.int64 and buffer.dim() == 2:  # the table of a hash router
                buffer.random_(block.num_experts)
    randomise(model, torch.Generator().manual_seed(0))
    if block.decorated:
        cast(model, dtype)
    else:
        model.to(dtype)
    return model.eval()


def inputs(
    label: str, length: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    """Arguments for two sequences of ``length`` tokens; of images, where it takes these."""
    generator = torch.Generator().manual_seed(seed)
    if label == "vitpose_backbone":
        images = torch.randn(2, 3, 32, 32, generator=generator).to(dtype)
        return {"pixel_values": images, "dataset_index": torch.tensor([1, 2])}
    ids = torch.randint(SIZES["vocab_size"], (2, length), generator=generator)
    if label in ("nllb_moe", "switch_transformers"):
        return {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    return {"input_ids": ids, "use_cache": False}


def result(output: Any) -> Tensor:
    """Of a block its tokens; of a model its logits, or last hidden states if it has no head."""
    while not isinstance(output, Tensor):
        output = output[-1] if isinstance(output, list) else output[0]
    return output


def moe_layers(label: str, model: nn.Module, values: Mapping[str, Any]) -> int:
    """How many times a forward goes through an MoE block."""
    calls: list[None] = []
    hooks = [
        module.register_forward_hook(lambda *_: calls.append(None))
        for module in _blocks(label, model)
    ]
    model(**values)
    for hook in hooks:
        hook.remove()
    return len(calls)


def effect_of_experts(label: str, model: nn.Module, values: Mapping[str, Any]) -> float:
    """How far the result moves if every expert takes the weights of its neighbour, relative to the
    largest value: a comparison with a tolerance near that would show nothing."""
    weights = {
        id(weight): weight
        for block in _blocks(label, model)
        for weight in block.parameters()
        if weight.dim() == 3 and weight.shape[0] == BLOCKS[label].num_experts
    }
    expected = result(model(**values)).double()
    for step in (1, -1):
        for weight in weights.values():
            weight.data = weight.data.roll(step, 0)
        if step == 1:
            moved = result(model(**values)).double()
    return float((moved - expected).abs().max() / expected.abs().max())


def _blocks(label: str, model: nn.Module) -> list[nn.Module]:
    block = BLOCKS[label]
    classes = modeling(block)
    name = f"{block.block}Experts" if block.block.endswith("Text") else block.block
    return [module for module in model.modules() if isinstance(module, getattr(classes, name))]


def _model_class(block: Block) -> type[PreTrainedModel]:
    """The class with this configuration and the first of `_ENDINGS` that there is."""
    config_class = configuration(block)
    named = vars(modeling(block)).items()
    models = [
        (name, entry)
        for name, entry in named
        if inspect.isclass(entry) and getattr(entry, "config_class", None) is config_class
    ]
    for ending in _ENDINGS:
        for name, entry in models:
            if name.endswith(ending) and "PreTrained" not in name:
                return entry
    raise LookupError(f"no model for {config_class.__name__}")


def _own(block: Block) -> dict[str, Any]:
    """No special tokens: their numbers are beyond a small vocabulary. Latent attention has keys for
    every head."""
    names = {entry.name for entry in dataclasses.fields(configuration(block))}
    own: dict[str, Any] = {
        name: None for name in names if name.endswith(("pad_token_id", "os_token_id"))
    }
    return own | ({"num_key_value_heads": 4} if "kv_lora_rank" in names else {})
