"""Layers and models to measure: real widths, transformers' own classes, random weights.

A layer is taken out of a model that is made with as few layers as have one, from a config as
transformers writes it. Its experts run as grouped matrix products (``grouped_mm``), transformers'
own choice where it has one.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_fx.bench.floor import Work
from moe_fx.cli.tiny import require_transformers
from moe_fx.errors import ConfigurationError
from moe_fx.weights.expert_parameters import likely_experts

__all__ = ["LAYERS", "MODELS", "Block", "Layer", "build_block", "build_model", "from_file"]

_STD = 0.02
_VOCABULARY = 4096
_DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_LAYER_COUNTS = (1, 2, 4, 8)
"""So many layers are made until one of them has experts."""


@dataclass(frozen=True)
class Layer:
    """title: for people. config: as a ``config.json`` of transformers has it, of the whole model;
    what decides on anything but the MoE layer may be missing."""

    name: str
    title: str
    config: Mapping[str, Any] = field(hash=False)


_QWEN3 = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
_MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_DEEPSEEK_SHARE = {
    "model_type": "qwen3_moe",
    "hidden_size": 7168,
    "moe_intermediate_size": 2048,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
_DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
_GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
}

LAYERS: dict[str, Layer] = {
    layer.name: layer
    for layer in (
        Layer("qwen3", "Qwen3-30B-A3B: 128 experts, k 8, 2048 × 768", _QWEN3),
        Layer("mixtral", "Mixtral-8x7B: 8 experts, k 2, 4096 × 14336", _MIXTRAL),
        Layer(
            "deepseek",
            "DeepSeek-V3, the 32 of 256 experts that one of 8 GPUs holds: k 8, 7168 × 2048, "
            "without the shared expert, with Qwen3's router",
            _DEEPSEEK_SHARE,
        ),
        Layer("gpt-oss", "GPT-OSS-20B: 32 experts, k 4, 2880 × 2880, biases", _GPT_OSS),
    )
}
MODELS: dict[str, Layer] = LAYERS | {
    "deepseek": Layer("deepseek", "DeepSeek-V3: all 256 experts, shared expert", _DEEPSEEK)
}
"""The same, but for whole models: two layers of each."""


def from_file(path: Path) -> Layer:
    """A layer of the model that the ``config.json`` at ``path`` describes; of a multimodal one, of
    its language model. Quantisation is left out. `ConfigurationError` if it is no such file."""
    try:
        found = json.loads(path.read_text())
        raw = found.get("text_config") or found
        model_type = raw["model_type"]
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ConfigurationError(
            f"--config {path}: expected a config.json as transformers writes it, with its "
            f"model_type: {type(error).__name__}: {error}"
        ) from None
    kept = {name: value for name, value in raw.items() if name != "quantization_config"}
    return Layer(path.parent.name or path.stem, f"{model_type} ({path})", kept)


@dataclass(frozen=True)
class Block:
    """An MoE block: router, experts and, if it has one, the shared expert.

    module: called with tokens ``[1, T, hidden]``. experts: its part that is called with the ids of
    the selected experts.
    """

    module: nn.Module
    experts: nn.Module
    hidden: int

    def selected(self, tokens: Tensor) -> Tensor:
        """``[T, k]``: the experts that the block's own router selects; nothing else runs."""
        found: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            found.extend(
                each
                for each in given
                if isinstance(each, Tensor) and each.ndim == 2 and not each.is_floating_point()
            )
            raise _Selected

        handle = self.experts.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                self.module(tokens)
        except _Selected:
            pass
        finally:
            handle.remove()
        if len(found) != 1:
            raise ConfigurationError(
                f"{type(self.experts).__name__} is not called with one tensor of expert ids, so "
                "that it cannot be told which experts tokens use."
            )
        return found[0]

    def work(self) -> Work:
        """From the shapes of its parameters: matrices of an expert, and those that all tokens go
        through."""
        tables = list(self.experts.parameters())
        own = {id(table) for table in tables}
        dense = [p for p in self.module.parameters() if id(p) not in own]
        item = tables[0].element_size()
        return Work(
            row_flops=sum(2 * table[0].numel() for table in tables if table.ndim == 3),
            expert_bytes=sum(table[0].numel() * table.element_size() for table in tables),
            dense_flops=sum(2 * matrix.numel() for matrix in dense if matrix.ndim == 2),
            dense_bytes=sum(each.numel() * each.element_size() for each in dense),
            token_bytes=self.hidden * item,
        )


class _Selected(Exception):
    """The experts have been selected: no more of the block needs to run."""


def build_block(layer: Layer, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Block:
    """Without gradients. Raises `ConfigurationError` if the model has no block that is called with
    tokens alone."""
    for count in _LAYER_COUNTS:
        if any(True for _ in likely_experts(_model(layer, count, torch.device("meta"), dtype))):
            break
    else:
        raise ConfigurationError(
            f"{layer.title}: no layer with experts among its first {_LAYER_COUNTS[-1]}."
        )
    model = _model(layer, count, device, dtype)
    slot = likely_experts(model)[0]
    path = slot.full_name.removesuffix(f".{slot.name}")
    module = model.get_submodule(path.rpartition(".")[0])
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
    if len(needed) != 1:
        raise ConfigurationError(
            f"{layer.title}: the experts are in {type(module).__name__}, which is called with "
            f"{', '.join(needed)}; only blocks that are called with tokens alone can be measured."
        )
    return Block(module, slot.module, model.config.hidden_size)


def build_model(layer: Layer, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A causal language model of two layers with experts, and a vocabulary of 4096."""
    return _model(layer, 2, device, dtype, "AutoModelForCausalLM")


def _has_choice(config_class: type) -> bool:
    """Whether the experts of these models have more than one implementation."""
    from transformers import MODEL_MAPPING

    if config_class not in MODEL_MAPPING:
        return False
    asked = getattr(MODEL_MAPPING[config_class], "_can_set_experts_implementation", None)
    return bool(asked and asked())


def _model(
    layer: Layer, count: int, device: torch.device, dtype: torch.dtype, kind: str = "AutoModel"
) -> Any:
    """In eval mode and without gradients. Matrices are normal, so that tokens use experts evenly;
    the rest is as transformers initialises it."""
    require_transformers()
    import transformers

    raw = dict(layer.config)
    layers = raw.get("num_hidden_layers")
    for name, value in raw.items():  # lists with an entry for each layer
        if isinstance(value, list) and len(value) == layers:
            raw[name] = value[:count]
    try:
        default = transformers.AutoConfig.for_model(raw["model_type"])
        known = default.to_dict()
        raw |= {name: 0 for name in _DENSE_FIRST if name in known}
        raw |= {"mlp_only_layers": []} if "mlp_only_layers" in known else {}
        small = {"num_hidden_layers": count, "vocab_size": _VOCABULARY, "pad_token_id": None}
        config = type(default).from_dict(raw | small)
        if _has_choice(type(config)):
            config._experts_implementation = "grouped_mm"
        with torch.device(device), torch.no_grad():
            model = getattr(transformers, kind).from_config(config, dtype=dtype)
    except ValueError as error:
        raise ConfigurationError(f"{layer.title}: transformers refuses it: {error}") from error
    model.eval().requires_grad_(False)
    if device.type != "meta":
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=_STD)
    return model
