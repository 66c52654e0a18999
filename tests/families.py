"""One tiny MoE block of every transformers family that has experts, with random, seeded weights.
(bamba's code provides for experts and makes none: its block is a dense one.)

A block is the smallest module that holds router, experts and, where there is one, the shared
expert. `tests/models.py` has whole models of some families.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

__all__ = [
    "BLOCKS",
    "DECORATED",
    "HIDDEN",
    "SIZES",
    "Block",
    "build",
    "configuration",
    "configure",
    "inputs",
    "modeling",
]

HIDDEN = 64
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "intermediate_size", "ffn_dim", "d_ff"), HIDDEN),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp"), HIDDEN),
    **dict.fromkeys(("moe_intermediate_size", "expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    "ffn_hidden_size": 32,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk"), 2),
    **dict.fromkeys(("top_k_experts", "moe_k", "num_hidden_layers", "num_layers"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "part_features"), 16),
    "vocab_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Sizes by every name that configurations have for them; a configuration takes those it knows."""
_GROUPS = (
    ("n_group", "topk_group"),
    ("num_group", "topk_group"),
    ("num_expert_group", "topk_group"),
)


@dataclass(frozen=True)
class Block:
    """family: folder of ``transformers.models``. block, config: class names there; gemma's blocks
    are put together from the classes that start with ``block``. num_experts, top_k: what there is
    to find. decorated: the family lets one choose its experts' implementation. name: if one family
    has several blocks."""

    family: str
    block: str
    config: str
    num_experts: int = 8
    top_k: int = 2
    kwargs: Mapping[str, Any] = field(default_factory=dict, compare=False)
    decorated: bool = True
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or self.family


class _GemmaBlock(nn.Module):
    """Gemma has no module of its own for it: router and experts are called by the layer."""

    def __init__(self, config: Any, modeling: Any, prefix: str) -> None:
        super().__init__()
        self.router = getattr(modeling, f"{prefix}Router")(config)
        self.experts = getattr(modeling, f"{prefix}Experts")(config)
        norm = getattr(modeling, f"{prefix.removesuffix('Text')}RMSNorm")
        self.norm = norm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, residual: Tensor) -> Tensor:
        flat = residual.reshape(-1, residual.shape[-1])
        _, weights, ids = self.router(flat)
        hidden: Tensor = self.experts(self.norm(flat), ids, weights)
        return hidden.reshape(residual.shape)


_ALL = (
    Block("afmoe", "AfmoeSparseMoeBlock", "AfmoeConfig"),
    Block("aria", "AriaTextMoELayer", "AriaTextConfig"),
    Block("axk1", "AXK1MoE", "AXK1Config"),
    Block("axk2", "AXK2MoE", "AXK2Config"),
    Block("bailing_hybrid", "BailingHybridMoE", "BailingHybridConfig"),
    Block("bamba", "BambaMLP", "BambaConfig", num_experts=1, top_k=1, decorated=False),
    Block("beam", "BeamMoE", "BeamConfig"),
    Block("cohere2_moe", "Cohere2MoeSparseMoeBlock", "Cohere2MoeConfig"),
    Block("dbrx", "DbrxFFN", "DbrxConfig", decorated=False),
    Block("deepseek_ocr2", "DeepseekOcr2TextMoe", "DeepseekOcr2TextConfig"),
    Block("deepseek_v2", "DeepseekV2Moe", "DeepseekV2Config"),
    Block("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config"),
    Block("deepseek_v32", "DeepseekV32MoE", "DeepseekV32Config"),
    Block(
        "deepseek_v4",
        "DeepseekV4SparseMoeBlock",
        "DeepseekV4Config",
        kwargs={"mlp_layer_types": ["moe", "moe"]},
    ),
    Block(
        "deepseek_v4",
        "DeepseekV4SparseMoeBlock",
        "DeepseekV4Config",
        kwargs={"mlp_layer_types": ["hash_moe", "hash_moe"]},
        name="deepseek_v4 (hash)",
    ),
    Block("diffusion_gemma", "DiffusionGemmaText", "DiffusionGemmaTextConfig"),
    Block(
        "doge",
        "DogeCDMoE",
        "DogeConfig",
        16,
        kwargs={"num_experts": 16, "is_moe": True},
        decorated=False,
    ),
    Block("dots1", "Dots1MoE", "Dots1Config", kwargs={"n_shared_experts": 1}),
    Block(
        "dots3_note", "Dots3NoteTextMoE", "Dots3NoteTextConfig", kwargs={"num_key_value_heads": 4}
    ),
    Block("ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock", "Ernie4_5_MoeConfig"),
    Block(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeMoeBlock",
        "Ernie4_5_VLMoeTextConfig",
        kwargs={"moe_intermediate_size": [32, 16]},
    ),
    Block("exaone_moe", "ExaoneMoeSparseMoEBlock", "ExaoneMoeConfig"),
    Block("flex_olmo", "FlexOlmoSparseMoeBlock", "FlexOlmoConfig"),
    Block("flint", "FlintSparseMoeBlock", "FlintConfig"),
    Block("gemma4", "Gemma4Text", "Gemma4TextConfig", kwargs={"enable_moe_block": True}),
    Block("glm4_moe", "Glm4MoeMoE", "Glm4MoeConfig"),
    Block("glm4_moe_lite", "Glm4MoeLiteMoE", "Glm4MoeLiteConfig"),
    Block("glm4v_moe", "Glm4vMoeTextMoE", "Glm4vMoeTextConfig"),
    Block("glm5_next", "Glm5NextTextMoE", "Glm5NextTextConfig", kwargs={"num_key_value_heads": 4}),
    Block("glm_moe_dsa", "GlmMoeDsaMoE", "GlmMoeDsaConfig"),
    Block("gpt_oss", "GptOssMLP", "GptOssConfig"),
    Block("granitemoe", "GraniteMoeMoE", "GraniteMoeConfig"),
    Block("granitemoe_swa", "GraniteMoeSWAMoE", "GraniteMoeSWAConfig"),
    Block("granitemoehybrid", "GraniteMoeHybridMoE", "GraniteMoeHybridConfig"),
    Block("granitemoeshared", "GraniteMoeSharedMoE", "GraniteMoeSharedConfig"),
    Block("hunyuan_v1_moe", "HunYuanMoEV1Moe", "HunYuanMoEV1Config"),
    Block("hy_v3", "HYV3MoE", "HYV3Config"),
    Block("hy_v4", "HYV4MoE", "HYV4Config"),
    Block("hy_v4_vl", "HYV4VLMoE", "HYV4VLTextConfig"),
    Block("inkling", "InklingMoE", "InklingTextConfig"),
    Block("inkling2", "Inkling2SparseMoeBlock", "Inkling2TextConfig"),
    Block("inkling2_loop", "Inkling2LoopSparseMoeBlock", "Inkling2LoopTextConfig"),
    Block("jamba", "JambaSparseMoeBlock", "JambaConfig"),
    Block(
        "jetmoe",
        "JetMoeMoE",
        "JetMoeConfig",
        kwargs={"activation_function": "silu"},
        decorated=False,
    ),
    Block("kimi_linear", "KimiLinearMoE", "KimiLinearConfig"),
    Block("kolibri1", "Kolibri1SparseMoeBlock", "Kolibri1Config"),
    Block("laguna", "LagunaSparseMoeBlock", "LagunaConfig"),
    Block("lara_mini", "LaraMiniSparseMoeBlock", "LaraMiniConfig"),
    Block("lfm2_moe", "Lfm2MoeSparseMoeBlock", "Lfm2MoeConfig"),
    Block("llama4", "Llama4TextMoe", "Llama4TextConfig", decorated=False),
    Block(
        "longcat_flash",
        "LongcatFlashMoE",
        "LongcatFlashConfig",
        kwargs={"zero_expert_num": 2},
        decorated=False,
    ),
    Block("mellum", "MellumSparseMoeBlock", "MellumConfig"),
    Block("mimo_v2_flash", "MiMoV2FlashMoE", "MiMoV2FlashConfig"),
    Block("minimax", "MiniMaxSparseMoeBlock", "MiniMaxConfig"),
    Block("minimax_m2", "MiniMaxM2SparseMoeBlock", "MiniMaxM2Config"),
    Block("minimax_m3_vl", "MiniMaxM3VLSparseMoeBlock", "MiniMaxM3VLTextConfig"),
    Block("mistral4", "Mistral4MoE", "Mistral4Config"),
    Block("mistral_large4", "MistralLarge4TextMoE", "MistralLarge4TextConfig"),
    Block("mixtral", "MixtralSparseMoeBlock", "MixtralConfig"),
    Block("muse_spark", "MuseSparkMoE", "MuseSparkTextConfig"),
    Block("nemotron_h", "NemotronHMoE", "NemotronHConfig"),
    Block("nllb_moe", "NllbMoeSparseMLP", "NllbMoeConfig", decorated=False),
    Block("olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig"),
    Block("openai_privacy_filter", "OpenAIPrivacyFilterMLP", "OpenAIPrivacyFilterConfig"),
    Block("phimoe", "PhimoeSparseMoeBlock", "PhimoeConfig"),
    Block("qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig"),
    Block("qwen3_5_moe", "Qwen3_5MoeSparseMoeBlock", "Qwen3_5MoeTextConfig"),
    Block("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig"),
    Block("qwen3_next", "Qwen3NextSparseMoeBlock", "Qwen3NextConfig"),
    Block("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextSparseMoeBlock", "Qwen3OmniMoeTextConfig"),
    Block("qwen3_vl_moe", "Qwen3VLMoeTextSparseMoeBlock", "Qwen3VLMoeTextConfig"),
    Block("qwen4_exp", "Qwen4ExpTextSparseMoeBlock", "Qwen4ExpTextConfig"),
    Block("solar_open", "SolarOpenMoE", "SolarOpenConfig"),
    Block("step3p7", "Step3p7SparseMoeBlock", "Step3p7TextConfig", decorated=False),
    Block(
        "switch_transformers",
        "SwitchTransformersSparseMLP",
        "SwitchTransformersConfig",
        top_k=1,
        decorated=False,
    ),
    Block("unlimited_ocr", "UnlimitedOcrTextMoe", "UnlimitedOcrTextConfig"),
    Block(
        "vitpose_backbone",
        "VitPoseBackboneMoeMLP",
        "VitPoseBackboneConfig",
        4,
        1,
        kwargs={"num_experts": 4},
        decorated=False,
    ),
    Block("zaya", "ZayaSparseMoeBlock", "ZayaConfig", top_k=1, kwargs={"num_experts_per_tok": 1}),
)

BLOCKS: dict[str, Block] = {block.label: block for block in _ALL}
DECORATED: tuple[str, ...] = tuple(label for label, block in BLOCKS.items() if block.decorated)


def build(
    label: str, impl: str = "grouped_mm", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, PreTrainedConfig]:
    """The block in eval mode and its configuration. ``impl`` is "grouped_mm" or "batched_mm"."""
    block = BLOCKS[label]
    classes = modeling(block)
    config = configure(block)
    config._experts_implementation_internal = impl
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _block(classes, block, config)
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.data.normal_(std=0.2)
            elif tensor.dtype == torch.int64:  # the table of a hash router
                tensor.data.random_(block.num_experts)
    _cast(module, classes, dtype)
    return module.eval(), config


def inputs(
    label: str, dtype: torch.dtype = torch.float32, seed: int = 1, length: int = 12
) -> tuple[Tensor, ...]:
    """Arguments of the block's forward: tokens ``[2, length, HIDDEN]``, perhaps ids."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, length, HIDDEN, generator=generator).to(dtype)
    if label == "vitpose_backbone":
        return tokens, torch.tensor([1, 2])
    if label == "deepseek_v4 (hash)":
        return tokens, torch.randint(SIZES["vocab_size"], (2, length), generator=generator)
    return (tokens,)


def configuration(block: Block) -> type[PreTrainedConfig]:
    module = f"transformers.models.{block.family}.configuration_{block.family}"
    found: type[PreTrainedConfig] = getattr(importlib.import_module(module), block.config)
    return found


def modeling(block: Block) -> ModuleType:
    return importlib.import_module(f"transformers.models.{block.family}.modeling_{block.family}")


def configure(
    block: Block, sizes: Mapping[str, Any] = SIZES, own: Mapping[str, Any] | None = None
) -> PreTrainedConfig:
    """A small configuration: what it knows of ``sizes``, then the block's own, then ``own``."""
    config_class = configuration(block)
    known = {entry.name for entry in dataclasses.fields(config_class)}
    kwargs = {name: size for name, size in sizes.items() if name in known}
    for groups, chosen in _GROUPS:
        default = getattr(config_class, groups, None)
        if groups in known and isinstance(default, int):
            kwargs |= {groups: 1, chosen: 1} if default == 1 else {groups: 4, chosen: 2}
    kwargs |= {**block.kwargs, **(own or {})}
    if block.family == "dbrx":
        kwargs["ffn_config"] = {"hidden_size": HIDDEN, "ffn_hidden_size": 32}
        kwargs["ffn_config"] |= {"moe_num_experts": 8, "moe_top_k": 2}
    return config_class(**kwargs)


def _block(classes: ModuleType, block: Block, config: PreTrainedConfig) -> nn.Module:
    if block.block.endswith("Text"):
        return _GemmaBlock(config, classes, block.block)
    block_class = getattr(classes, block.block)
    wanted = inspect.signature(block_class.__init__).parameters
    offered = {"layer_idx": 1, "ffn_dim": HIDDEN}
    module: nn.Module = block_class(config, **{k: v for k, v in offered.items() if k in wanted})
    return module


def _cast(module: nn.Module, classes: ModuleType, dtype: torch.dtype) -> None:
    """As `from_pretrained` does: what the family keeps in float32 stays
    (``_keep_in_fp32_modules`` is about float16 only)."""
    kept: set[str] = set()
    for entry in vars(classes).values():
        if inspect.isclass(entry) and entry.__name__.endswith("PreTrainedModel"):
            kept |= set(getattr(entry, "_keep_in_fp32_modules_strict", None) or ())
    pattern = re.compile("|".join(rf"(^|\.){re.escape(part)}(\.|$)" for part in kept) or r"(?!)")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and not pattern.search(f"mlp.{name}"):
            tensor.data = tensor.data.to(dtype)
