"""A layer that is declined although its experts were to be spread over ranks is a warning."""

from __future__ import annotations

import linecache
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moe_fx
from moe_fx.testing import RankPool
from tests.testing.layers import Layer, LowestScores, tokens


class Two(nn.Module):
    """Two declined layers of one line of source."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([LowestScores(), LowestScores()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def warned(rank: int, model: type[nn.Module], how: str) -> list[tuple[str, str, int]]:
    """(message, file, line) of what compiling for two shapes, and once more, warns of."""
    block = model()
    options: dict[str, Any] = {"base": "eager"}
    if how == "group":
        options["ep_group"] = dist.group.WORLD
    if how == "shards":
        moe_fx.shard_experts(block)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for size in (12, 14, 12):
            torch.compile(block, backend="moe_fx", dynamic=False, options=options)(tokens(size, 32))
    found = [each for each in caught if each.category is moe_fx.DeclinedLayerWarning]
    return [(str(each.message), each.filename, each.lineno) for each in found]


def test_each_layer_is_told_once_with_reason_and_line(ranks2: RankPool) -> None:
    for found in ranks2.run(warned, Two, "group"):
        assert [f"layers.{at} (" in found[at][0] for at in range(2)] == [True, True]
        assert len(found) == 2
        for message, file, line in found:
            assert "each of the 2 ranks computes all of its experts" in message
            assert "The reason: the selection takes the lowest scores" in message
            assert file.endswith("tests/testing/layers.py")
            assert "topk(2, largest=False)" in linecache.getline(file, line)


def test_shards_that_are_gathered_for_a_declined_layer(ranks2: RankPool) -> None:
    for found in ranks2.run(warned, LowestScores, "shards"):
        ((message, _, _),) = found
        assert "its experts' shards are gathered on every rank, in every step" in message


def test_no_warning_where_nothing_is_lost(ranks2: RankPool) -> None:
    for model, how in ((Layer, "group"), (Layer, "shards"), (LowestScores, "one device")):
        for found in ranks2.run(warned, model, how):
            assert found == []
