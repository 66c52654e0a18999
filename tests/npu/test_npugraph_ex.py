"""npugraph_ex compiles, captures and replays rewritten models on the fake device, with its own host
code down to each launch; nothing here says what hardware would do."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from moe_fx.testing import RankPool
from tests.npu.ranks import Launched, launched

EXCHANGES = ("HcclAlltoAllV", "HcclAlltoAll")
CASES = [
    ("qwen3_moe", "allgather", False),
    ("qwen3_moe", "allgather", True),
    ("deepseek_v3", "padded_alltoall", False),
    ("deepseek_v3", "padded_alltoall", True),
]


@pytest.mark.parametrize("kind, strategy, dynamic", CASES)
def test_exchanges_run_on_their_stream_with_compute_between(
    ranks2: RankPool, kind: str, strategy: str, dynamic: bool
) -> None:
    options = {"strategy": strategy, "overlap": 2}
    for result in ranks2.run(launched, kind, 9, dynamic, options):
        assert result.declined == []
        assert result.replayed
        assert result.races == []
        assert all(plan.host_sync == "" for plan in result.plans)
        _check_streams(result)


def _check_streams(result: Launched) -> None:
    """Every exchange between its events; matrix products launched while one is under way."""
    main = _stream_of("aclnnGroupedMatmul", result)
    exchange = {
        stream
        for name, stream, _ in result.trace
        if name == "aclrtStreamWaitEvent" and stream != main
    }
    assert exchange
    filled = sum(_compute_between(at, result, main) for at in _arrivals(result, main, exchange))
    assert filled > 0


def _stream_of(op: str, result: Launched) -> str:
    streams = {stream for name, stream, _ in result.trace if name.startswith(op)}
    assert len(streams) == 1, f"{op} runs on {streams}"
    return streams.pop()


def _arrivals(result: Launched, main: str, exchange: set[str]) -> list[tuple[int, int]]:
    """(where it was recorded on an exchange's stream, where the main stream waits for it)."""
    recorded: dict[str, int] = {}
    found = []
    for at, (name, stream, event) in enumerate(result.trace):
        if name == "aclrtRecordEvent" and stream in exchange:
            recorded[event] = at
        elif name == "aclrtStreamWaitEvent" and stream == main and event in recorded:
            found.append((recorded.pop(event), at))
    return found


def _compute_between(span: tuple[int, int], result: Launched, main: str) -> bool:
    start, end = span
    return any(
        stream == main and name.startswith("aclnn") for name, stream, _ in result.trace[start:end]
    )


def test_exact_sizes_name_their_sync_and_are_not_captured(ranks2: RankPool) -> None:
    options = {"strategy": "alltoall", "overlap": 2}
    for result in ranks2.run(launched, "qwen3_moe", 9, False, options):
        assert result.plans[0].host_sync == "moe_fx::split_sizes"
        assert "split_sizes" in result.plans[0].capture
        assert not result.replayed
        assert result.races == []
        assert "moe_fx.exchange.default" in result.nodes


def test_mc2_has_no_host_sync_and_no_data_dependent_size(ranks2: RankPool) -> None:
    big: dict[str, Any] = {"hidden_size": 1024}
    run = partial(launched, **big)
    for result in ranks2.run(run, "qwen3_moe", 9, False, {"strategy": "mc2"}):
        assert result.declined == []
        assert [plan.strategy for plan in result.plans] == ["mc2", "mc2"]
        assert all(plan.host_sync == "" for plan in result.plans)
        syncs = {"moe_fx.split_sizes.default", "aten._local_scalar_dense.default", "aten.item"}
        assert syncs.isdisjoint(result.nodes)
        assert result.unbacked == []
        assert "npu.npu_moe_distribute_dispatch_v2.default" in result.nodes
        assert "npu.npu_moe_distribute_combine_v2.default" in result.nodes
        assert result.replayed


def test_mc2_is_refused_with_its_limit(ranks2: RankPool) -> None:
    for result in ranks2.run(launched, "qwen3_moe", 9, False, {"strategy": "mc2"}):
        assert all("hidden size 64, MC2 takes 1024" in reason for reason in result.declined)
        assert len(result.declined) == 2


def test_cores_are_limited_where_asked(ranks2: RankPool) -> None:
    options = {"strategy": "allgather", "overlap": 1, "exchange_cores": (4, 8)}
    for result in ranks2.run(launched, "qwen3_moe", 9, False, options):
        assert result.races == []
        assert result.replayed
