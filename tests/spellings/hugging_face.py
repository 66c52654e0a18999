"""Blocks of transformers that bring their own dispatch: those of the ten families without
``use_experts_implementation`` that Dynamo captures in one graph.

Of the other six, dbrx, longcat_flash, nllb_moe, step3p7 and switch_transformers loop over the
experts that were hit, whose number no compiler knows, and bamba has no experts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import transformers as hf
from torch import Tensor, nn

from tests.spellings.base import HIDDEN, RENORMALISED, SIGMOID, SOFTMAX, TOP_K, Spelling, seeded

_COMMON: dict[str, Any] = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K}


class FirstOutput(nn.Module):
    """A block that also returns its router's logits, without them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)[0]


class DatasetExperts(nn.Module):
    """ViTPose picks an expert per image, by the data set it is from: as ``arange % E`` here."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, x[:, 0, 0].mul(7).long().abs() % 4)


def _block(family: str, name: str, config: str, **kwargs: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        settings = getattr(hf, config)(**(_COMMON | kwargs))
        return getattr(modeling, name)(settings)

    return make


def _first(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: FirstOutput(make())


_LLAMA4 = _block(
    "llama4",
    "Llama4TextMoe",
    "Llama4TextConfig",
    intermediate_size=24,
    num_local_experts=8,
)
_JETMOE = _block(
    "jetmoe",
    "JetMoeMoE",
    "JetMoeConfig",
    intermediate_size=24,
    num_local_experts=8,
    activation_function="silu",
)
_DOGE = _block("doge", "DogeCDMoE", "DogeConfig", intermediate_size=24, num_experts=16, is_moe=True)
_VITPOSE = _block(
    "vitpose_backbone",
    "VitPoseBackboneMoeMLP",
    "VitPoseBackboneConfig",
    mlp_ratio=2,
    num_experts=4,
    part_features=8,
)

SPELLINGS = (
    Spelling(
        "hf_llama4",
        seeded(_first(_LLAMA4)),
        "dense",
        router=SIGMOID,
        weights_first=True,
        shared_expert=True,
    ),
    Spelling(
        "hf_jetmoe",
        seeded(_JETMOE),
        "split rows",
        router=replace(RENORMALISED, softmax_after_topk=True),
        needs_fullgraph=True,
        notes="token of a row by div(rounding_mode='trunc'); a bias is added to the sum",
    ),
    Spelling(
        "hf_doge",
        seeded(_first(_DOGE)),
        "gathered weights",
        num_experts=16,
        shared_expert=True,
        notes="an expert is one row of each of two embeddings, picked by a product of two keys; "
        "logits of different tokens mix, so the selection is not per token",
    ),
    Spelling(
        "hf_vitpose",
        seeded(lambda: DatasetExperts(_VITPOSE())),
        "dense",
        router=SOFTMAX,
        num_experts=4,
        top_k=1,
        notes="experts per image, given from outside: nothing is selected",
    ),
)
