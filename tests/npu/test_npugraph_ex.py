"""npugraph_ex compiles, captures and replays rewritten models on the fake device, with its own host
code down to each launch; nothing here says what hardware would do."""

from __future__ import annotations

import pytest
import torch

from moe_fx.testing import RankPool
from tests.npu.ranks import Launched, launched, on_device

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
    result = on_device(ranks2, launched, kind, 9, dynamic, options)
    assert result.declined == []
    assert result.replayed
    assert result.races == []
    assert result.unnoticed == []
    assert all(plan.host_sync == "" for plan in result.plans)
    _check_streams(result)


def _check_streams(result: Launched) -> None:
    """Each exchange, on a stream of its own, behind what the main stream had made, and before the
    main stream goes on with what arrived; matrix products are launched while some are under way."""
    trace = result.trace
    main = _stream_of("aclnnGroupedMatmul", result)
    exchanges = [at for at, (name, _, _) in enumerate(trace) if name in EXCHANGES]
    starting = ("npu_define.all_to_all_single_npu.default", "moe_fx.exchange_counts.default")
    assert len(exchanges) == sum(node in starting for node in result.nodes)
    assert all(trace[at][1] != main for at in exchanges)
    filled = 0
    for at in exchanges:
        behind = _behind(trace, at, main)
        assert behind is not None, f"{trace[at]} is not behind the main stream"
        joined = _joined(trace, at, main)
        assert joined is not None, f"the main stream never waits for {trace[at]}"
        filled += any(s == main and n.startswith("aclnn") for n, s, _ in trace[at:joined])
    assert filled > 0


def _stream_of(op: str, result: Launched) -> str:
    streams = {stream for name, stream, _ in result.trace if name.startswith(op)}
    assert len(streams) == 1, f"{op} runs on {streams}"
    return streams.pop()


def _behind(trace: list[tuple[str, str, str]], at: int, main: str) -> int | None:
    """Where the main stream recorded what the launch at ``at`` is behind, through other streams."""
    stream = trace[at][1]
    for before in range(at - 1, -1, -1):
        name, on, event = trace[before]
        if name == "aclrtStreamWaitEvent" and on == stream:
            for record in range(before - 1, -1, -1):
                if trace[record][0] == "aclrtRecordEvent" and trace[record][2] == event:
                    found = record if trace[record][1] == main else _behind(trace, record, main)
                    if found is not None:
                        return found
                    break
    return None


def _joined(trace: list[tuple[str, str, str]], at: int, main: str) -> int | None:
    """Where the main stream waits for the launch at ``at``, through other streams."""
    stream = trace[at][1]
    for record in range(at + 1, len(trace)):
        name, on, event = trace[record]
        if name == "aclrtRecordEvent" and on == stream:
            for wait in range(record + 1, len(trace)):
                if trace[wait][0] == "aclrtStreamWaitEvent" and trace[wait][2] == event:
                    return wait if trace[wait][1] == main else _joined(trace, wait, main)
    return None


def test_exact_sizes_name_their_sync_and_are_not_captured(ranks2: RankPool) -> None:
    options = {"strategy": "alltoall", "overlap": 2}
    result = on_device(ranks2, launched, "qwen3_moe", 9, False, options)
    assert result.plans[0].host_sync == "moe_fx::split_sizes"
    assert "split_sizes" in result.plans[0].capture
    assert not result.replayed
    assert result.races == []
    assert "moe_fx.exchange.default" in result.nodes


def test_mc2_has_no_host_sync_and_no_data_dependent_size(ranks2: RankPool) -> None:
    options = {"strategy": "mc2"}
    result = on_device(ranks2, launched, "qwen3_moe", 9, False, options, hidden_size=1024)
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
    result = on_device(ranks2, launched, "qwen3_moe", 9, False, {"strategy": "mc2"})
    assert all("hidden size 64, MC2 takes 1024" in reason for reason in result.declined)
    assert len(result.declined) == 2


def test_cores_are_limited_where_asked(ranks2: RankPool) -> None:
    options = {"strategy": "allgather", "overlap": 1, "exchange_cores": (4, 8)}
    result = on_device(ranks2, launched, "qwen3_moe", 9, False, options)
    assert result.races == []
    assert result.replayed
    assert [node for node in result.nodes if "limit" in node], result.nodes


def test_auto_takes_mc2_where_it_fits(ranks2: RankPool) -> None:
    options = {"strategy": "auto", "even_tokens": True, "overlap": 1}
    fits = on_device(ranks2, launched, "qwen3_moe", 9, False, options, hidden_size=1024)
    assert [plan.strategy for plan in fits.plans] == ["mc2", "mc2"]
    narrow = on_device(ranks2, launched, "qwen3_moe", 9, False, options)
    assert len(narrow.plans) == 2
    assert "mc2" not in [plan.strategy for plan in narrow.plans]


def test_an_npu_has_no_assertion_of_its_own() -> None:
    """If this fails, equal numbers of tokens can be checked there."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert not has("aten::_assert_async.msg", "PrivateUse1")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_eager_dispatcher_is_lowered_on_the_device(ranks2: RankPool, dynamic: bool) -> None:
    options = {"strategy": "alltoall", "overlap": 2}
    result = on_device(ranks2, launched, "dispatcher", 9, dynamic, options)
    assert result.declined == []
    assert result.races == []
    wanted = {"npu.npu_moe_token_permute.default", "npu.npu_grouped_matmul.default"}
    assert {*wanted, "moe_fx.exchange.default"} <= set(result.nodes)
