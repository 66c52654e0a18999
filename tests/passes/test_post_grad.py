"""`moe_fx.MoEPass` on the graphs that Inductor hands to its post-grad hooks."""

from __future__ import annotations

import copy
import itertools
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import moe_fx
from moe_fx import passes, sources
from moe_fx.compat import CustomGraphPass
from moe_fx.entry import graph_pass
from moe_fx.testing import RankPool
from tests.e2e.ranks import expert_block, relative_error
from tests.models import FAMILIES, build, token_ids
from tests.passes.graphs import block, op_names, tokens
from tests.passes.grouped import Grouped
from tests.passes.post_grad import compiled_with, hooked, post_grad_graph
from tests.passes.recognise.test_router import CUSTOM, TEMPLATES, SharpenedSoftmax, SoftmaxOfSigmoid

MODELS = ("qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss")
IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
EXACT = 1e-5
ACTIVATIONS = {"gpt_oss": "clamped_swiglu"}


# -- every layer of real models --------------------------------------------------------------------

# The rest runs with the slow tests.
CASES_BY_DAY = {
    *((family, "grouped_mm", torch.float32) for family in MODELS),
    ("qwen3_moe", "batched_mm", torch.float32),
    ("gpt_oss", "batched_mm", torch.float32),
}
CASES = [
    pytest.param(*case, marks=[] if case in CASES_BY_DAY else [pytest.mark.slow])
    for case in itertools.product(MODELS, IMPLEMENTATIONS, TOLERANCE)
]


def check_regions(report: moe_fx.Report, family: str, impl: str, program: str) -> None:
    """As before decomposition: `tests/e2e/test_families.py` asks the same of `moe_fx.explain`."""
    expected = FAMILIES[family]
    assert report.declined == []
    assert len(report.regions) == expected.moe_layers
    for region in report.regions:
        router = region.router
        assert (region.num_experts, region.top_k) == (expected.num_experts, expected.top_k)
        assert (router.score, router.select_bias) == (expected.score, expected.select_bias)
        assert (router.num_groups, router.topk_group) == (expected.num_groups, expected.topk_group)
        assert router.renormalise == expected.renormalise
        assert router.scale == pytest.approx(expected.scale, rel=1e-2)
        assert router.verified and region.verified
        assert region.has_shared_expert == expected.shared_expert
        assert region.activation == ACTIVATIONS.get(family, "silu")
        assert (region.form, region.program) == (impl, program)
        assert f"/{family}/modeling_{family}.py:" in region.source


@pytest.mark.parametrize(("family", "impl", "dtype"), CASES, ids=str)
def test_every_layer_of_a_decomposed_model_is_found_and_computes_the_same(
    family: str, impl: str, dtype: torch.dtype
) -> None:
    model, config = build(family, impl, dtype)
    inputs = {"input_ids": token_ids(config, 1, 12), "use_cache": False}
    moe_pass = moe_fx.MoEPass()
    with torch.no_grad():
        expected = model(**inputs).logits
        found = compiled_with(moe_pass, model)(**inputs).logits
    assert relative_error(found, expected) <= TOLERANCE[dtype]
    (report,) = moe_pass.reports
    check_regions(report, family, impl, "local")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_hook_after_inductors_own_passes_serves_as_well(impl: str) -> None:
    model, x = expert_block(impl=impl), tokens(1, 9, 64)
    moe_pass = moe_fx.MoEPass()
    with torch.no_grad():
        found = compiled_with(moe_pass, model, post=True)(x)
        assert relative_error(found, model(x)) <= EXACT
    assert [len(report.regions) for report in moe_pass.reports] == [1]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_dynamic_graph_serves_every_token_count(impl: str) -> None:
    model, moe_pass = expert_block(impl=impl), moe_fx.MoEPass()
    with torch.no_grad():
        compiled = compiled_with(moe_pass, model, dynamic=True)
        for count in (9, 2, 64):
            x = tokens(1, count, 64, seed=count)
            assert relative_error(compiled(x), model(x)) <= EXACT
    assert [len(report.regions) for report in moe_pass.reports] == [1]


# -- routers and other spellings -------------------------------------------------------------------


# Inductor folds the factor on the logits into the softmax's own subtraction.
FOLDED = (SharpenedSoftmax,)


@pytest.mark.parametrize(
    "layer", [each for each in TEMPLATES if each not in FOLDED], ids=lambda layer: layer.__name__
)
def test_the_score_function_is_found_in_a_decomposed_router(layer: type[Grouped]) -> None:
    graph = post_grad_graph(layer(), tokens(12, 32))
    assert not any("softmax" in op or "silu" in op for op in op_names(graph))
    (region,) = analysed(graph).regions
    router = region.router
    assert TEMPLATES[layer] == type(router)(**{**vars(router), "softmax_after_topk": False})


@pytest.mark.parametrize("count", [1, 8])
def test_one_expert_per_token_of_weight_one_does_not_hide_the_score_function(count: int) -> None:
    """The weights say nothing, and 8 tokens of 8 experts are not run as other numbers."""
    layer = block("deepseek_v3", num_experts_per_tok=1)
    (region,) = analysed(post_grad_graph(layer, tokens(1, count, 64))).regions
    assert (region.router.score, region.router.verified) == ("sigmoid", True)


@pytest.mark.parametrize("layer", [*FOLDED, SoftmaxOfSigmoid])
def test_a_decomposed_router_that_is_no_template_is_custom(layer: type[Grouped]) -> None:
    (region,) = analysed(post_grad_graph(layer(), tokens(12, 32))).regions
    assert replace(region.router, note="") == CUSTOM


def analysed(graph: GraphModule) -> moe_fx.Report:
    moe_pass = moe_fx.MoEPass()
    moe_pass(graph)
    (report,) = moe_pass.reports
    return report


# -- the contract of a hook ------------------------------------------------------------------------


class Dense(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x @ x.t()).softmax(-1)


class Descending(Grouped):
    """Declined: rows sorted the wrong way round."""

    def sort(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sort(ids, descending=True)  # type: ignore[return-value]


@pytest.mark.parametrize(("model", "declined"), [(Dense, 0), (Descending, 1)])
def test_a_graph_without_a_match_stays_as_it_came(model: type[nn.Module], declined: int) -> None:
    graph = post_grad_graph(model(), tokens(12, 32))
    before = [
        (n, n.name, n.target, n.args, dict(n.kwargs), dict(n.meta)) for n in graph.graph.nodes
    ]
    text = graph.code
    report = analysed(graph)
    assert (len(report.regions), len(report.declined)) == (0, declined)
    after = [(n, n.name, n.target, n.args, dict(n.kwargs), dict(n.meta)) for n in graph.graph.nodes]
    assert after == before
    assert graph.code == text and GraphModule(graph, graph.graph).code == text


def test_what_is_not_of_the_layer_stays_as_it_came() -> None:
    model, config = build("deepseek_v3")
    graph = post_grad_graph(model, input_ids=token_ids(config, 1, 12), use_cache=False)
    before = {n: (n.target, n.kwargs) for n in graph.graph.nodes}
    placeholders = graph.graph.find_nodes(op="placeholder")
    analysed(graph)
    assert graph.graph.find_nodes(op="placeholder") == placeholders
    kept = [n for n in graph.graph.nodes if n in before]
    assert len(kept) > 0.7 * len(before)
    assert all((n.target, n.kwargs) == before[n] for n in kept)
    gone = {str(n.target) for n in before if n not in set(kept)}
    assert {
        "aten.sort.default",
        "prims.iota.default",
        "transformers.grouped_mm_fallback.default",
    } <= gone


def test_new_nodes_have_values_and_only_ops_that_inductor_compiles(ranks2: RankPool) -> None:
    for missing, unbound, ops in ranks2.run(inserted_nodes):
        assert missing == []
        assert unbound == []
        assert sum("moe_fx.wait" in op for op in ops) == 2
        assert not {"aten.silu.default", "aten.transpose.int", "aten._to_copy.default"} & set(ops)


def inserted_nodes(rank: int) -> tuple[list[str], list[str], list[str]]:
    """(names of nodes without a value, of waits without a binding of their new size, all ops)."""
    graph = post_grad_graph(
        expert_block().to(torch.bfloat16), tokens(1, 9, 64, dtype=torch.bfloat16)
    )
    moe_fx.MoEPass({"ep_group": dist.group.WORLD})(graph.graph)
    calls = [n for n in graph.graph.nodes if n.op == "call_function"]
    first_wait = next(n for n in calls if n.target is torch.ops.moe_fx.wait.default)
    return (
        [n.name for n in calls if "val" not in n.meta],
        [] if first_wait.meta.get("unbacked_bindings") else [first_wait.name],
        op_names(graph),
    )


def test_graph_module_and_graph_and_the_arguments_of_other_hooks_are_accepted() -> None:
    block, x = expert_block(), tokens(1, 9, 64)
    expected = block(x)
    as_module, as_graph = (post_grad_graph(block, x) for _ in range(2))
    moe_pass = moe_fx.MoEPass()
    moe_pass(as_module, example_inputs=[x], config=None)
    moe_pass(as_graph.graph)
    as_graph.recompile()
    orphan = torch.fx.Graph()
    orphan.output(orphan.graph_copy(post_grad_graph(block, x).graph, {}))
    moe_pass(orphan)
    assert orphan.owning_module is None
    assert isinstance(moe_pass, CustomGraphPass)
    assert [len(report.regions) for report in moe_pass.reports] == [1, 1, 1]
    values = {tuple(p.shape): p for p in [x, *block.parameters()]}
    for graph in (as_module, as_graph, GraphModule(nn.Module(), orphan)):
        inputs = [
            values[tuple(n.meta["val"].shape)] for n in graph.graph.find_nodes(op="placeholder")
        ]
        assert relative_error(graph(*inputs)[0], expected) <= EXACT


def test_reports_reach_the_caller_and_strict_refuses_what_was_declined() -> None:
    seen: list[moe_fx.Report] = []
    moe_pass = moe_fx.MoEPass({"strict": True, "on_report": seen.append})
    moe_pass(post_grad_graph(Dense(), tokens(12, 32)))
    with pytest.raises(moe_fx.NothingMatched, match="descending"):
        moe_pass(post_grad_graph(Descending(), tokens(12, 32)))
    assert len(seen) == 2 and moe_pass.reports == seen


def test_a_copied_configuration_holds_the_same_pass(ranks2: RankPool) -> None:
    assert ranks2.run(copied) == [True, True]


def copied(rank: int) -> bool:
    moe_pass = moe_fx.MoEPass({"ep_group": dist.group.WORLD})
    return copy.deepcopy([moe_pass])[0] is moe_pass


# -- two ranks -------------------------------------------------------------------------------------


BY_DAY = {
    ("qwen3_moe", "grouped_mm", "replicated"),
    ("gpt_oss", "batched_mm", "replicated"),
    ("deepseek_v3", "grouped_mm", "gathered"),
}


@pytest.mark.parametrize(
    ("family", "impl", "program"),
    [
        pytest.param(*case, marks=[] if case in BY_DAY else [pytest.mark.slow])
        for case in itertools.product(MODELS, IMPLEMENTATIONS, ("replicated", "gathered"))
    ],
)
def test_two_ranks_give_what_eager_gives(
    ranks2: RankPool, family: str, impl: str, program: str
) -> None:
    for error, report, ops in ranks2.run(on_ranks, family, impl, program, "post_grad_eager"):
        assert error <= EXACT
        assert {region["program"] for region in report["regions"]} == {program}
        assert len(report["regions"]) == FAMILIES[family].moe_layers
        assert sum("moe_fx.wait" in op for op in ops) == 2 * FAMILIES[family].moe_layers
        assert not any("all_gather" in op for op in ops)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "program",
    [
        pytest.param("replicated", marks=pytest.mark.grid),
        pytest.param("gathered", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", MODELS)
def test_inductor_on_two_ranks_gives_what_eager_gives(
    ranks2: RankPool, family: str, program: str
) -> None:
    for error, report, _ in ranks2.run(
        on_ranks, family, "grouped_mm", program, "inductor", timeout=300
    ):
        assert error <= EXACT
        assert len(report["regions"]) == FAMILIES[family].moe_layers


def on_ranks(
    rank: int, family: str, impl: str, program: str, base: str
) -> tuple[float, dict[str, Any], list[str]]:
    """(error, report, ops of the rewritten graph); other tokens, and number, on each rank."""
    group = dist.group.WORLD
    assert group is not None
    model, config = build(family, impl)
    inputs = {"input_ids": token_ids(config, 1, 9 - 4 * rank, seed=rank), "use_cache": False}
    graphs: list[torch.fx.Graph] = []
    with torch.no_grad(), fresh_cache():
        expected = model(**inputs).logits
        if program == "gathered":
            moe_fx.shard_experts(model, group)
        moe_pass = moe_fx.MoEPass({"ep_group": group} if program == "replicated" else {})
        found = compiled_with([moe_pass, graphs.append], model, base=base)(**inputs).logits
    (report,) = moe_pass.reports
    ops = [str(n.target) for n in graphs[0].nodes if n.op == "call_function"]
    return relative_error(found, expected), report.to_dict(), ops


@pytest.mark.parametrize("odd", ["other experts", "nothing matched"])
def test_ranks_with_other_plans_are_told_before_they_would_hang(ranks2: RankPool, odd: str) -> None:
    first, second = ranks2.run(differing_plans, odd)
    if odd == "other experts":
        assert "num_experts=8" in first and "num_experts=16" in first
        assert "num_experts=8" in second and "num_experts=16" in second
    else:
        assert "rank(s) [1]" in first and second == ""


def differing_plans(rank: int, odd: str) -> str:
    """What is raised; rank 1 is the odd one."""
    group = dist.new_group()
    other = rank == 1 and odd == "other experts"
    options = {"ep_group": group, "agree_timeout": 60.0 if odd == "other experts" else 0.5}
    moe_pass = moe_fx.MoEPass(options)
    hook = (lambda graph: None) if rank == 1 and odd == "nothing matched" else moe_pass
    compiled = compiled_with(hook, expert_block(num_experts=16 if other else 8))
    try:
        with torch.no_grad():
            compiled(tokens(1, 9, 64))
    except moe_fx.RanksDiffer as error:
        return str(error)
    return ""


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_training_is_right_and_each_declined_graph_says_why(impl: str, checkpointed: bool) -> None:
    """A forward that hands the experts' rows to a backward made already cannot be rewritten."""
    model, x = expert_block(impl=impl), tokens(1, 9, 64)

    def step(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)

    expected = gradients(model, model(x))
    moe_pass = moe_fx.MoEPass()
    with hooked(moe_pass):  # the backward graph is compiled when it is needed
        found = gradients(model, compiled_with(moe_pass, step)(x))
    assert all(relative_error(found[name], expected[name]) <= EXACT for name in expected)
    forward, backward = moe_pass.reports
    assert backward.regions == []
    assert len(forward.regions) == int(checkpointed)  # what is computed again need not be handed on
    reasons = {declined.reason for declined in (*forward.declined, *backward.declined)}
    if not checkpointed:
        assert reasons == {"the experts' rows are also read by output"}


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- the compile cache -----------------------------------------------------------------------------


def test_the_key_changes_with_the_options_and_with_nothing_else() -> None:
    def key(**options: Any) -> str:
        return moe_fx.MoEPass(options).uuid()

    assert key() == key() == key(on_report=print) == key(verify="compile")
    assert len({key(), key(verify="off"), key(verify="always"), key(strict=True)}) == 4
    assert moe_fx.MoEPass(moe_fx.Options(strict=True)).uuid() == key(strict=True)


def test_the_key_covers_the_place_in_the_group(ranks2: RankPool) -> None:
    keys = [key for pair in ranks2.run(keys_of_rank) for key in pair]
    assert len({*keys, moe_fx.MoEPass().uuid()}) == 5
    assert keys == [key for pair in ranks2.run(keys_of_rank) for key in pair]


def keys_of_rank(rank: int) -> tuple[str, str]:
    return moe_fx.MoEPass().uuid(), moe_fx.MoEPass({"ep_group": dist.group.WORLD}).uuid()


def test_the_key_is_of_the_sources_wherever_they_are_and_changes_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert moe_fx.__file__ is not None
    package = tmp_path / "moe_fx"
    shutil.copytree(Path(moe_fx.__file__).parent, package)
    shutil.copytree(Path(passes.__path__[0]), package / "passes", dirs_exist_ok=True)
    before = moe_fx.MoEPass().uuid()
    program = "import moe_fx; print(moe_fx.__file__); print(moe_fx.MoEPass().uuid())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(package / "__init__.py"), before]
    with open(package / "passes" / "overlap.py", "a") as file:
        file.write("\n# edited\n")
    edited = sources.digest_of_sources([package / "passes", package])
    monkeypatch.setattr(graph_pass, "SOURCES", edited)
    assert moe_fx.MoEPass().uuid() != before


@pytest.mark.slow
def test_a_warm_cache_serves_the_same_options_only() -> None:
    """Real Inductor: the second compilation comes from the cache, and never runs the pass; the
    third, with other options, does not."""
    model, x = expert_block(), tokens(1, 9, 64)
    seen = []
    with fresh_cache(), torch.no_grad():
        for options in ({}, {}, {"verify": "off"}):
            moe_pass = moe_fx.MoEPass(options)
            counters.clear()
            found = compiled_with(moe_pass, model, base="inductor")(x)
            assert relative_error(found, model(x)) <= EXACT
            hits = counters["inductor"]["fxgraph_cache_hit"]
            seen.append((hits, [len(report.regions) for report in moe_pass.reports]))
    assert seen == [(0, [1]), (1, []), (0, [1])]
