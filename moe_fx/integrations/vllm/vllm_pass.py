"""The pass that vLLM calls on each graph that it compiles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.version import __version__ as vllm_version

from moe_fx.entry.graph_pass import agree_when_run, module_of
from moe_fx.errors import NothingMatched
from moe_fx.graph.copy import copy_graph
from moe_fx.graph.splice import splice
from moe_fx.integrations.vllm.layout import Layout, Unsupported, layout
from moe_fx.integrations.vllm.open_layer import REPLICATED, open_layer
from moe_fx.integrations.vllm.options import VllmOptions, parse
from moe_fx.integrations.vllm.sites import Site, sites
from moe_fx.passes.overlap.overlap import overlap
from moe_fx.plan import ExchangePlan, slices
from moe_fx.region import Declined, source_of
from moe_fx.report import Report
from moe_fx.sources import SOURCES
from moe_fx.version import __version__

log = init_logger("vllm.moe_fx")  # vLLM configures the loggers below its own


class VllmMoEPass(InductorPass):
    """Opens the MoE layers of vLLM's graphs (docs/vllm.md), in place.

    ``options``: `VllmOptions`, or a mapping of them; None: those of the environment. The report of
    each graph with MoE layers is appended to ``reports`` and logged.

    ::

        compilation_config={"inductor_compile_config": {"post_grad_custom_post_pass": VllmMoEPass(
            {"strategy": "alltoall"})}}
    """

    def __init__(self, options: Mapping[str, Any] | VllmOptions | None = None) -> None:
        self.options = parse(options)
        self.reports: list[Report] = []

    def __call__(self, graph: Graph) -> None:
        if self.open(graph).plans:
            overlap(graph, self.options.overlap_memory, pinned=True)

    def open(self, graph: Graph, captured: bool = False) -> Report:
        """Rewrite ``graph`` in place; exchanges stand where they were put. captured: what becomes
        of it will be captured, so that nothing in it may wait for the device."""
        report = Report(graphs=1)
        found: list[Site] = []
        try:
            found = list(sites(graph))
            if not found:
                return report
            plan, where = self._plan(found, captured)
            for site in found:
                site.check(where)
        except Unsupported as reason:
            report.declined += [_declined(site, str(reason)) for site in found]
            if not found:
                report.declined.append(Declined(str(reason), "", ""))
        else:
            report.plans += [plan] * len(found)
            self._rewrite(graph, where, report)
        self._tell(report)
        return report

    def _plan(self, found: list[Site], captured: bool) -> tuple[ExchangePlan, Layout]:
        where = layout(_layers())
        strategy = self._strategy(where, found, captured)
        expert_slices = 1
        if strategy == "alltoall":
            expert_slices, _ = slices(where.local_experts, self.options.overlap)
        plan = ExchangePlan(
            strategy=strategy,
            num_experts=where.num_experts,
            local_experts=where.local_experts,
            group_name=where.group_name,
            world_size=where.world_size,
            rank=where.rank,
            expert_slices=expert_slices,
        )
        return plan, where

    def _strategy(self, where: Layout, found: list[Site], captured: bool) -> str:
        """Inlined layers get the tokens of all ranks, whatever the parallelism."""
        differing = where.different_tokens and found[0].opaque
        wanted = self.options.strategy
        if wanted == "alltoall" and captured:
            raise Unsupported(
                "strategy='alltoall' waits for the device, and this graph will be captured; "
                "'allgather' does not, where all ranks have as many tokens"
            )
        if wanted == REPLICATED and differing:
            raise Unsupported("strategy='replicated': data-parallel ranks have different tokens")
        if differing and where.kernels_exchange:
            raise Unsupported("data parallel: the layers' kernels exchange tokens themselves")
        if differing and self.options.min_tokens > 0:
            raise Unsupported(
                f"min_tokens={self.options.min_tokens}: data-parallel ranks have different numbers "
                "of tokens, and one in an opened graph would wait for one that is not in it"
            )
        if wanted != "auto":
            return wanted
        if differing:
            return "allgather" if captured else "alltoall"
        if current_platform.is_cpu():
            return REPLICATED
        raise Unsupported(
            "every rank has all tokens, and vLLM's kernels skip the experts of others by "
            "themselves: nothing would be gained (strategy='alltoall' opens it all the same)"
        )

    def _rewrite(self, graph: Graph, where: Layout, report: Report) -> None:
        module = copy_graph(module_of(graph))
        origin = dict(zip(module.graph.nodes, graph.nodes, strict=True))
        for site, plan in zip(list(sites(module.graph)), report.plans, strict=True):
            open_layer(module.graph, site, where, plan)
        module.graph.eliminate_dead_code()
        agree_when_run(module, report, self.options.agree_timeout)
        splice(graph, module, origin)

    def _tell(self, report: Report) -> None:
        self.reports.append(report)
        for plan in dict.fromkeys(report.plans):
            log.info("%d MoE layers opened: %s", report.plans.count(plan), plan.summary)
        for declined in report.declined:
            log.warning("MoE layer left alone: %s (at %s)", declined.reason, declined.source)
        if self.options.strict and report.declined:
            reasons = "; ".join(declined.reason for declined in report.declined)
            raise NothingMatched(f"strict: not every MoE layer was opened: {reasons}")

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        """Whether graphs for so many tokens are opened."""
        return bool(compile_range.end >= self.options.min_tokens)

    def uuid(self) -> str:
        """Key of what this pass does, for vLLM's and Inductor's caches: where layers are and which
        ranks there are follows from vLLM's configuration, which is in its key."""
        described = {
            "moe_fx": __version__,
            "sources": SOURCES,
            "torch": torch.__version__,
            "vllm": vllm_version,
            "options": self.options.model_dump(),
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _layers() -> Mapping[str, Any]:
    if not is_forward_context_available():
        raise Unsupported("vLLM compiles outside of a forward pass: its layers are not known")
    layers: Mapping[str, Any] = get_forward_context().no_compile_layers
    return layers


def _declined(site: Site, reason: str) -> Declined:
    return Declined(reason, site.node.name, source_of(site.node))
