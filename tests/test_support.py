"""The families that docs/support.md is about: all that there are, each with experts that matter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.families import BLOCKS, DECORATED
from tests.language_models import MODELS, build, effect_of_experts, inputs, moe_layers
from tests.support import selected
from tests.support_cases import Case, Outcome
from tests.support_page import page


def test_every_family_that_lets_one_choose_its_experts_is_there() -> None:
    folder = Path(transformers.__file__).parent / "models"
    found = {
        path.parent.name
        for path in folder.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text()
    }
    assert found == {BLOCKS[label].family for label in DECORATED}


@pytest.mark.slow
@pytest.mark.parametrize("label", [label for label in MODELS if label in DECORATED])
def test_the_experts_of_a_model_matter(label: str) -> None:
    model = build(label)
    values = inputs(label, 9)
    with torch.no_grad():
        assert moe_layers(label, model, values) >= 2
        assert effect_of_experts(label, model, values) > 1e-2


def test_no_case_is_there_twice() -> None:
    cases = selected(None, [])
    assert len(cases) == len(set(cases))


def test_a_page_says_what_is_not_right_and_why() -> None:
    right = Outcome("yes", 2, 2, 2, True, "2 of 8", "softmax")
    declined = Outcome("no", 1, 0, 0, None, why="5 graphs")
    results = {
        Case("model", "mixtral", "grouped_mm", "float32"): right,
        Case("model", "mixtral", "grouped_mm", "float32", dynamic=True): right,
        Case("model", "dbrx", "-", "float32"): declined,
    }
    text = page(results)
    assert "Of 2 models, 1 are right in every row." in text
    assert "| mixtral | grouped_mm | float32 | yes | 2 of 2 | 2 of 2 | yes | yes |" in text
    assert "| dbrx | - | float32 | no | 0 of 1 | 0 of 1 | - | - |" in text
    assert "- dbrx (model): 5 graphs\n" in text
    assert "mixtral (model" not in text
