"""A proof can fail: each input that a layer reads is changed alone, its effect is reported, and a
layer is declined where an effect could not be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_fx.passes.evaluate import compare, sizes
from moe_fx.passes.evaluate.typical import drawn, kind_of
from moe_fx.passes.recognise.by_value import trials
from moe_fx.passes.verify import rank_values
from tests.passes.graphs import block, captured, rewritten, tokens
from tests.proofs.layers import HIDDEN, SPELLINGS, TOKENS, random, route, weights
from tests.proofs.situations import MASKS, SITUATIONS, masked_by

Class = Callable[[Any], bool]

CLASSES: dict[str, tuple[Class, Callable[[], Any]]] = {
    "integers": (
        lambda node: kind_of(node) == "integers",
        lambda: masked_by(torch.int64, **MASKS["weights multiplied"]),
    ),
    "bools": (
        lambda node: kind_of(node) == "bools",
        lambda: SITUATIONS["a table pruned by a mask"],
    ),
}


def test_every_input_of_a_layer_is_listed_with_its_effect() -> None:
    module = block("gpt_oss")
    report = rewritten(captured(module, tokens(2, 6, 64)).module, 2)[1]
    (region,) = report.regions
    read = {"tokens", "weights"} | {"ids"}
    kinds = [effect.kind for effect in region.effects]
    assert read <= set(kinds)
    assert kinds.count("floats") == 4  # two tables, two biases
    assert all(effect.change > 1e-3 for effect in region.effects)


def test_every_input_of_a_loop_is_listed_with_its_effect() -> None:
    found = masked_by(torch.int64, **MASKS["weights multiplied"]).outcome("loop")
    assert {"tokens", "logits", "integers", "floats"} <= {e.kind for e in found.effects}


@pytest.mark.parametrize("kind", ["integers", "bools"])
@pytest.mark.parametrize("spelling", ["loop", "one_hot"])
def test_a_layer_is_unproved_if_one_class_of_inputs_is_never_changed(
    kind: str, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_class, situation = CLASSES[kind]
    _never_change(monkeypatch, of_class)
    found = situation().outcome(spelling)
    assert found.verdict == "declined"
    assert found.reasons[0].startswith("unproved: ")


@pytest.mark.parametrize(
    ("name", "of_class"),
    [
        ("tables", lambda node: node.meta["val"].dim() == 3),
        ("biases", lambda node: node.meta["val"].dim() == 2 and kind_of(node) == "floats"),
    ],
)
def test_a_layer_is_unproved_if_its_parameters_are_never_changed(
    name: str, of_class: Class, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = captured(block("gpt_oss"), tokens(2, 6, 64))
    _never_change(monkeypatch, lambda node: not _varies(node) and of_class(node))
    graph, report = rewritten(case.module, 2)
    assert graph is None
    assert report.declined[0].reason.startswith("unproved: ")


def test_a_layer_is_unproved_if_its_scalars_are_never_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = captured(_Scaled(), tokens(TOKENS, HIDDEN), dynamic=True)
    graph, report = rewritten(case.module)
    assert graph is not None
    assert "scalar" in {effect.kind for effect in report.regions[0].effects}
    _never_change(monkeypatch, lambda node: kind_of(node) == "scalar")
    graph, report = rewritten(case.module)
    assert graph is None
    assert report.declined[0].reason.startswith("unproved: ")


class _Scaled(nn.Module):
    """A loop whose experts' rows are scaled by a float of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.5
        for name, tensor in weights().items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = route(x, self.gate)
        return SPELLINGS["loop"](x, w * self.scale, ids, self.w1, self.w2)


def _varies(node: Any) -> bool:
    return node.op != "placeholder"


def _never_change(monkeypatch: pytest.MonkeyPatch, of_class: Class) -> None:
    def unchanged(node: Any, *args: Any, again: int = 0, **kwargs: Any) -> Any:
        is_tensor = kind_of(node) != "size"
        return drawn(node, *args, again=0 if is_tensor and of_class(node) else again, **kwargs)

    for module in (trials, rank_values, sizes):
        monkeypatch.setattr(module, "drawn", unchanged)


def test_what_shows_nothing() -> None:
    random_result = random(3, 4)
    assert compare.tells(random_result)
    assert not compare.tells(torch.zeros(3, 4))
    assert not compare.tells(torch.full((3, 4), 2.0))
    assert not compare.tells(random_result / 0)
    assert not compare.tells(random_result.sign())
