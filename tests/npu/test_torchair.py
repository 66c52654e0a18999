"""What torchair makes of rewritten models: the ops of the GE graph and their streams.

The golden files hold the ops that route, exchange and multiply; ``MOE_FX_UPDATE_GOLDEN=1`` writes
them anew.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from moe_fx.devices.ascend.streams import LABEL
from moe_fx.testing import RankPool
from tests.npu.ranks import Converted, converted, on_device

GOLDEN = Path(__file__).parent / "golden"
SHOWN = ("Hcom", "Moe", "GroupedMatmul", "SwiGlu")
WITHOUT_GE = "Failed get compiled summary"
"""How torchair ends where the stand-ins for GE do: after the graph was made."""
GROUPED = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2}
CASES: list[tuple[str, dict[str, Any], str, int]] = [
    ("dispatcher", {}, "alltoall", 1),
    ("qwen3_moe", {}, "alltoall", 1),
    ("qwen3_moe", {}, "allgather", 2),
    ("deepseek_v3", GROUPED, "alltoall", 1),
    ("deepseek_v3", GROUPED, "allgather", 2),
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind, fields, strategy, chunks", CASES)
def test_the_graph_is_the_golden_one(
    torchair_ranks: RankPool,
    kind: str,
    fields: dict[str, Any],
    strategy: str,
    chunks: int,
    dynamic: bool,
) -> None:
    options = {"strategy": strategy, "overlap": chunks}
    result = on_device(torchair_ranks, converted, kind, 9, dynamic, options, **fields)
    assert result.declined == []
    assert WITHOUT_GE in result.error
    name = f"{kind}-{strategy}-{'dynamic' if dynamic else 'static'}.txt"
    _compare(GOLDEN / name, _text(result))


def _text(result: Converted) -> str:
    lines = [f"{op[0]} {op[1]}".rstrip() for op in result.ops if op[0].startswith(SHOWN)]
    return "\n".join(lines) + "\n"


def _compare(file: Path, text: str) -> None:
    if os.environ.get("MOE_FX_UPDATE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_exchanges_of_rows_are_labelled_and_in_the_group(torchair_ranks: RankPool) -> None:
    options = {"strategy": "allgather", "overlap": 2, "exchange_cores": (4, 8)}
    result = on_device(torchair_ranks, converted, "qwen3_moe", 9, False, options)
    exchanges = [op[1:] for op in result.ops if "Hcom" in op[0]]
    assert len(exchanges) == 2 * (2 + 2 + 2)  # ids and weights, tokens, results; two layers
    ((label, group, *cores),) = set(exchanges)
    assert label == LABEL and group
    assert cores == ["4", "8"]


def test_mc2_is_two_ops(torchair_ranks: RankPool) -> None:
    options = {"strategy": "mc2"}
    result = on_device(torchair_ranks, converted, "qwen3_moe", 9, False, options, hidden_size=1024)
    kinds = [op[0] for op in result.ops if "Distribute" in op[0]]
    assert kinds == ["MoeDistributeDispatchV2", "MoeDistributeCombineV2"] * 2


def test_what_ge_does_not_know_is_said(torchair_ranks: RankPool) -> None:
    options = {"strategy": "padded_alltoall"}
    result = on_device(torchair_ranks, converted, "qwen3_moe", 9, False, options)
    assert all("base='torchair' has no converters" in reason for reason in result.declined)
    assert len(result.declined) == 2
