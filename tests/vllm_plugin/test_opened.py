"""Opened layers compute what their experts compute one by one, on two ranks over Gloo."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from torch.testing import assert_close
from vllm.config import CompilationConfig
from vllm.config.utils import Range

from moe_fx.errors import ConfigurationError
from moe_fx.integrations.vllm import register, vllm_pass
from moe_fx.integrations.vllm.vllm_pass import VllmMoEPass
from moe_fx.testing import RankError, RankPool
from tests.vllm_plugin import layers

pytestmark = pytest.mark.vllm


def opened(
    rank: int,
    different: bool,
    options: dict[str, Any],
    counts: list[int],
    form: str,
    reduces: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """What was planned; ``counts``: tokens of each call, dynamic where more than one."""
    world = dist.get_world_size()
    own = VllmMoEPass(options)
    function: Any = {
        "routed": layers.routed,
        "routed and shared": layers.routed_and_shared,
        "inlined": layers.inlined(rank, world),
    }[form]
    kernel = layers.Kernel(reduces=True) if reduces else None
    layer = layers.runner(rank, world, different, kernel=kernel)
    torch._dynamo.reset()
    with (
        layers.running(layer, dist.group.WORLD, not different),
        torch._inductor.config.patch(enable_auto_functionalized_v2=False),
        torch.no_grad(),
    ):
        run = layers.compiled(function, own)
        for count in counts:
            x, logits = layers.tokens(rank if different else 0, count)
            given = x.to(dtype, copy=True)
            if len(counts) > 1:
                torch._dynamo.mark_dynamic(given, 0)
                torch._dynamo.mark_dynamic(logits, 0)
            result = run(given, logits)
            if form == "routed and shared":
                assert_close(result[0], 3 * x.to(dtype))
                result = result[1]
            whole = result if different or reduces else layers.all_reduced(result)
            assert whole.dtype == dtype
            close = 1e-5 if dtype == torch.float32 else 5e-2
            assert_close(whole.float(), layers.dense(x, logits), atol=close, rtol=close)
    return [plan.strategy for report in own.reports for plan in report.plans]


@pytest.mark.parametrize("form, counts", [("routed", [6]), ("routed and shared", [7, 5, 3])])
@pytest.mark.parametrize(
    "different, strategy, overlap",
    [
        (False, "replicated", 1),
        (False, "alltoall", 1),
        (False, "alltoall", 4),
        (False, "allgather", 1),
        (True, "alltoall", 2),
        (True, "allgather", 1),
    ],
)
def test_by_value(
    ranks2: RankPool,
    different: bool,
    strategy: str,
    overlap: int,
    form: str,
    counts: list[int],
) -> None:
    options = {"strategy": strategy, "overlap": overlap, "strict": True}
    assert ranks2.run(opened, different, options, counts, form) == [[strategy]] * 2


@pytest.mark.parametrize(
    "strategy, overlap", [("replicated", 1), ("alltoall", 1), ("alltoall", 4), ("allgather", 1)]
)
def test_inlined_by_value(ranks2: RankPool, strategy: str, overlap: int) -> None:
    options = {"strategy": strategy, "overlap": overlap, "strict": True}
    assert ranks2.run(opened, False, options, [7, 5, 3], "inlined") == [[strategy]] * 2


@pytest.mark.parametrize("strategy", ["replicated", "alltoall"])
def test_a_result_that_vllm_takes_for_reduced_is(ranks2: RankPool, strategy: str) -> None:
    options = {"strategy": strategy, "strict": True}
    planned = ranks2.run(opened, False, options, [6], "routed and shared", True)
    assert planned == [[strategy]] * 2


@pytest.mark.parametrize("strategy", ["replicated", "alltoall", "allgather"])
def test_in_bfloat16(ranks2: RankPool, strategy: str) -> None:
    options = {"strategy": strategy, "strict": True}
    form, dtype = "routed and shared", torch.bfloat16
    assert ranks2.run(opened, False, options, [6], form, False, dtype) == [[strategy]] * 2


def names_given(rank: int) -> list[bool]:
    """Whether each op that needs the layer gets its name from outside of the graph."""
    found: list[bool] = []
    own = VllmMoEPass({"strategy": "replicated", "strict": True})

    def look(graph: Any) -> None:
        own(graph)
        needing = [n for n in graph.nodes if str(n.target).startswith("moe_fx_vllm.")]
        found.extend(any(i.op == "placeholder" for i in n.all_input_nodes[-1:]) for n in needing)

    with (
        layers.running(layers.runner(rank, 2), dist.group.WORLD, True),
        torch._inductor.config.patch(enable_auto_functionalized_v2=False),
        torch.no_grad(),
    ):
        torch._dynamo.reset()
        layers.compiled(layers.routed_and_shared, look)(*layers.tokens(0, 6))
    return found


def test_layers_may_share_a_graph(ranks2: RankPool) -> None:
    """Their names are arguments of it: of route, experts and shared."""
    assert ranks2.run(names_given) == [[True] * 3] * 2


@pytest.mark.parametrize("different, chosen", [(False, "replicated"), (True, "alltoall")])
def test_auto(ranks2: RankPool, different: bool, chosen: str) -> None:
    assert ranks2.run(opened, different, {}, [6], "routed") == [[chosen]] * 2


REFUSED = [
    ({"use_ep": False}, {}, "expert parallelism is off"),
    ({"enable_eplb": True}, {}, "EPLB"),
    ({"is_sequence_parallel": True}, {}, "sharded by sequence"),
    ({"pcp_size": 2}, {}, "prefill context parallelism"),
    ({"num_experts": 9}, {}, "9 experts are not a multiple of 2 ranks"),
    ({"is_lora_enabled": True}, {}, "LoRA"),
    ({"use_deferred_moe_finalize": True}, {}, "summed by what reads them"),
    ({"weighs_tokens": True}, {}, "routing weights multiply tokens"),
    ({"fuses_gate": True}, {}, "scores the shared expert too"),
    ({"monolithic": True}, {}, "routes tokens itself"),
    (
        {"data_parallel": True, "kernel": layers.Kernel(reduces=False)},
        {},
        "kernels exchange tokens themselves",
    ),
    ({"hidden_dim": 64}, {}, "the layers take [T, 64]"),
    ({"data_parallel": True}, {"strategy": "replicated"}, "different tokens"),
    ({"data_parallel": True}, {"min_tokens": 5}, "one in an opened graph would wait"),
]


def left_alone(rank: int, layer: dict[str, Any], options: dict[str, Any]) -> str:
    own = VllmMoEPass(options)
    with layers.running(layers.runner(rank, 2, **layer), dist.group.WORLD, True):
        torch._dynamo.reset()
        before: list[str] = []

        def both(graph: Any) -> None:
            before.append(str(graph))
            own(graph)
            before.append(str(graph))

        x, logits = layers.tokens(0, 6)
        with pytest.raises(BaseException):  # noqa: B017  what runs then is vLLM's own op
            layers.compiled(layers.routed_and_shared, both)(x, logits)
    assert before[0] == before[1]
    [report] = own.reports
    [declined] = report.declined
    assert "test_opened.py" in declined.source or "layers.py" in declined.source
    return declined.reason


@pytest.mark.parametrize("layer, options, reason", REFUSED)
def test_what_does_not_fit_is_left_alone(
    ranks2: RankPool, layer: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    for said in ranks2.run(left_alone, layer, options):
        assert reason in said


def on_another_platform(rank: int) -> str:
    with mock.patch.object(vllm_pass, "current_platform", SimpleNamespace(is_cpu=lambda: False)):
        return left_alone(rank, {}, {})


def test_kernels_that_skip_other_ranks_experts_are_left_alone(ranks2: RankPool) -> None:
    for said in ranks2.run(on_another_platform):
        assert "nothing would be gained" in said


def strict(rank: int) -> str:
    with pytest.raises(Exception, match="not every MoE layer was opened") as raised:
        opened(rank, True, {"strategy": "replicated", "strict": True}, [6], "routed")
    return str(raised.value)


def test_strict_raises(ranks2: RankPool) -> None:
    assert all("have different tokens" in said for said in ranks2.run(strict))


def test_the_key_of_the_compile_cache_is_of_the_options() -> None:
    def key(**options: Any) -> str:
        passes: Any = {"post_grad_custom_post_pass": VllmMoEPass(options)}
        return CompilationConfig(inductor_compile_config=passes).compute_hash()

    assert key() == key() != key(strategy="alltoall")
    assert key(overlap=2, strategy="alltoall") != key(strategy="alltoall")
    assert CompilationConfig().compute_hash() != key()


def test_the_name_in_the_configuration_is_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    register()  # as vLLM does, by its entry point
    config = CompilationConfig(inductor_passes={"post_grad_custom_post_pass": "moe_fx.vllm_pass"})
    found = config.inductor_compile_config["post_grad_custom_post_pass"]
    assert isinstance(found, VllmMoEPass)
    sent = pickle.loads(pickle.dumps(copy.deepcopy(found)))
    assert sent.uuid() == found.uuid()
    monkeypatch.setenv("MOE_FX_VLLM_OPTIONS", '{"strategy": "alltoall"}')
    assert VllmMoEPass().options.strategy == "alltoall"
    monkeypatch.setenv("MOE_FX_VLLM_OPTIONS", '{"stratgy": "alltoall"}')
    with pytest.raises(ConfigurationError, match="MOE_FX_VLLM_OPTIONS: stratgy"):
        VllmMoEPass()


def test_few_tokens_are_left_to_vllm() -> None:
    own = VllmMoEPass({"min_tokens": 32})
    assert not own.is_applicable_for_range(Range(start=1, end=31))
    assert own.is_applicable_for_range(Range(start=32, end=64))


def other_plans(rank: int) -> None:
    opened(rank, True, {"overlap": 1 + rank, "agree_timeout": 20}, [6], "routed")


def test_ranks_that_differ_do_not_hang() -> None:
    with RankPool(2) as pool, pytest.raises(RankError, match="RanksDiffer"):
        pool.run(other_plans)
