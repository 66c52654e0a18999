"""Layers, weights and inputs by the names that they have in the model."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from torch import nn

import moe_fx
from moe_fx.cli.tiny import tiny_model
from moe_fx.report import Report
from moe_fx.report.naming import plain
from tests.testing.layers import Layer, LowestScores, tokens


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](x)


@pytest.fixture(scope="module")
def found() -> Report:
    return moe_fx.explain(tiny_model("qwen3_moe"), torch.arange(12)[None], use_cache=False)


def test_a_layer_has_the_path_of_its_module_and_its_weights(found: Report) -> None:
    assert [region.module for region in found.regions] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]
    assert found.regions[1].weights == (
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    )


def test_nodes_are_named_after_the_parameters(found: Report) -> None:
    names = {effect.name for effect in found.regions[0].effects}
    assert "model_layers_0_mlp_experts_down_proj" in names
    assert not [name for name in names if re.fullmatch(r"arg\d+_1", name)]


def test_the_report_says_which_model_and_versions(found: Report) -> None:
    assert found.model == "Qwen3MoeForCausalLM"
    versions = {"moe_fx": moe_fx.__version__, "torch": torch.__version__}
    assert found.versions == versions | {"transformers": transformers.__version__}
    for text in (str(found), found.to_text(), found.to_html()):
        assert f"Qwen3MoeForCausalLM; moe_fx {moe_fx.__version__}" in text
        assert "model.layers.1.mlp" in text
    data = json.loads(found.to_json())
    assert data["regions"][1]["module"] == "model.layers.1.mlp"


def test_the_table_has_the_plan(found: Report) -> None:
    assert found.plans[0].summary in str(found)


def test_the_backend_says_the_same() -> None:
    reports: list[Report] = []
    options = {"base": "eager", "on_report": reports.append}
    torch._dynamo.reset()
    torch.compile(Model(Layer()), backend="moe_fx", options=options)(tokens(12, 32))
    (region,) = reports[0].regions
    assert region.module == "blocks.0" and all(w.startswith("blocks.0.") for w in region.weights)
    assert reports[0].model == "Model"


def test_a_declined_candidate_has_its_module() -> None:
    report = moe_fx.explain(Model(LowestScores()), tokens(12, 32))
    assert report.declined[0].module == "blocks.0"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['model']._modules['layers']._modules['0']", "model.layers.0"),
        ("L['self'].model.layers[3].mlp", "model.layers.3.mlp"),
        ("L['args'][0]", "args.0"),
        ("G['model']._parameters['weight']", "model.weight"),
        ("L['self']", ""),
    ],
)
def test_dynamos_names_are_read(source: str, name: str) -> None:
    assert plain(source) == name
