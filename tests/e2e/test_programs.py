"""Training, ragged tokens, dynamic shapes and memory of the rewritten programs, on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_fx.testing import RankPool
from tests.e2e.ranks import (
    block_errors,
    compare,
    expert_memory,
    model_graphs,
    unknown_spelling,
)
from tests.models import build

EXACT = 1e-5


@pytest.mark.parametrize("program", ["replicated", "gathered"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_gradients_of_every_parameter_equal_eager(
    ranks2: RankPool, family: str, program: str
) -> None:
    for result in ranks2.run(compare_training, family, "grouped_mm", program, "recording"):
        assert result.error <= EXACT
        assert {k: v for k, v in result.gradient_errors.items() if v > EXACT} == {}


def compare_training(rank: int, family: str, impl: str, program: str, base: str):  # type: ignore[no-untyped-def]
    return compare(rank, family, impl, torch.float32, program, base=base, gradients=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("family", "program"), [("qwen3_moe", "gathered"), ("gpt_oss", "replicated")]
)
def test_inductor_trains_like_eager(ranks2: RankPool, family: str, program: str) -> None:
    results = ranks2.run(compare_training, family, "batched_mm", program, "inductor", timeout=600)
    for result in results:
        assert result.error <= EXACT
        assert {k: v for k, v in result.gradient_errors.items() if v > EXACT} == {}


@pytest.mark.slow
def test_four_ranks_equal_eager(ranks4: RankPool) -> None:
    for result in ranks4.run(compare, "deepseek_v3", "grouped_mm", torch.float32, "gathered"):
        assert result.error <= EXACT


RAGGED = ((5, 9), (0, 4), (3, 0), (1, 6), (1, 1), (0, 0))


@pytest.mark.parametrize("gathered", [False, True], ids=["replicated", "gathered"])
@pytest.mark.parametrize("impl", ["grouped_mm", "batched_mm"])
def test_ragged_single_and_zero_tokens(ranks2: RankPool, impl: str, gathered: bool) -> None:
    for errors, _ in ranks2.run(ragged, impl, gathered):
        assert max(errors) <= EXACT


def ragged(rank: int, impl: str, gathered: bool) -> tuple[list[float], int]:
    return block_errors(rank, RAGGED, impl=impl, gathered=gathered)


@pytest.mark.parametrize("favourite", [0, 3, 7])
def test_all_tokens_to_one_expert(ranks2: RankPool, favourite: int) -> None:
    for errors, _ in ranks2.run(to_one_expert, favourite):
        assert max(errors) <= EXACT


def to_one_expert(rank: int, favourite: int) -> tuple[list[float], int]:
    return block_errors(rank, ((6, 11), (1, 3)), top_k=1, favourite=favourite)


@pytest.mark.parametrize("impl", ["grouped_mm", "batched_mm"])
def test_one_graph_serves_every_token_count(ranks2: RankPool, impl: str) -> None:
    for errors, graphs in ranks2.run(every_count, impl, "recording"):
        assert max(errors) <= EXACT
        assert graphs == 1


@pytest.mark.parametrize("base", ["recording", "aot_eager"])
def test_without_fullgraph_it_is_still_one_graph(ranks2: RankPool, base: str) -> None:
    for errors, graphs in ranks2.run(default_compile, base):
        assert max(errors) <= EXACT
        assert graphs == 1


def default_compile(rank: int, base: str) -> tuple[list[float], int]:
    return block_errors(rank, ((6, 9),), base=base, fullgraph=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_inductor_graph_serves_every_token_count(ranks2: RankPool) -> None:
    for errors, graphs in ranks2.run(every_count, "grouped_mm", "inductor", timeout=400):
        assert max(errors) <= EXACT
        assert graphs == 1


def every_count(rank: int, impl: str, base: str) -> tuple[list[float], int]:
    counts = tuple(
        (n, n + rank_extra) for n, rank_extra in ((7, 0), (1, 0), (2, 3), (64, 1), (1000, 0))
    )
    return block_errors(rank, counts, impl=impl, unbacked=True, dynamic=True, base=base)


@pytest.mark.parametrize(
    "family", ["qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)]
)
def test_dynamic_model_compiles_once_and_never_more_than_capture(
    ranks2: RankPool, family: str
) -> None:
    for errors, graphs, plain in ranks2.run(model_graphs, family, (7, 2, 64, 1000), timeout=300):
        assert max(errors) <= EXACT
        assert graphs == plain == 1
    for errors, graphs, plain in ranks2.run(model_graphs, family, (7, 1, 2), timeout=300):
        assert max(errors) <= EXACT
        assert graphs == plain  # Dynamo itself sets a sequence of one token apart


def test_a_rank_never_holds_more_experts_than_its_shard(ranks2: RankPool, tmp_path: Path) -> None:
    model, _ = build("qwen3_moe")
    model.save_pretrained(tmp_path)
    for held, whole, largest_whole, largest_seen in ranks2.run(expert_memory, str(tmp_path)):
        print(f"experts held {held} B of {whole} B; largest expert tensor made {largest_seen} B")
        assert held * 2 == whole
        assert 0 < largest_seen <= largest_whole // 2


def test_an_unknown_use_of_the_weights_runs_right_and_says_why(ranks2: RankPool) -> None:
    for error, declined, gathers in ranks2.run(unknown_spelling):
        assert error <= EXACT
        assert gathers
        assert len(declined) == 1
        assert declined[0]["reason"]
        assert "ranks.py:" in declined[0]["source"]
        print(declined[0])
