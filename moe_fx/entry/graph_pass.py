"""The passes as one pass in another compiler's hook: Inductor's, npugraph_ex's, vLLM's.

These hand over a graph that is decomposed and belongs to them: it is changed in place, and left as
it came if no MoE layer is found in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.fx import Graph, GraphModule, Node

import moe_fx.passes as passes
from moe_fx.compat import CustomGraphPass
from moe_fx.devices import device_for
from moe_fx.devices.plain import Plain
from moe_fx.entry.ambient import neutral
from moe_fx.entry.backend import check_devices
from moe_fx.entry.costly import warn_of_declined
from moe_fx.entry.net import groups_in, log_report, net
from moe_fx.entry.strict import refuse_missed
from moe_fx.errors import ConfigurationError
from moe_fx.graph.copy import copy_graph
from moe_fx.graph.splice import splice
from moe_fx.ops.fused import NUM_ARGUMENTS
from moe_fx.options import Options, parse_options
from moe_fx.ranks.agree import describe, ensure
from moe_fx.report import Report
from moe_fx.sources import SOURCES
from moe_fx.version import __version__


class MoEPass(CustomGraphPass):
    """Makes expert-parallel programs of the MoE layers in a post-grad graph, in place.

    ``options``: `moe_fx.Options`, or a mapping of them; ``base``: the compiler whose hook this is
    (for npugraph_ex and torchair the graph is lowered to NPU ops too). Under ``strict`` a missed
    candidate (`Report.missed`) raises `NothingMatched` (a graph without any does not). The report
    of each graph seen is appended to ``reports`` and given to ``options.on_report``; a graph that a
    compile cache brings back is not seen.

    ::

        torch._inductor.config.post_grad_custom_pre_pass = moe_fx.MoEPass({"ep_group": group})
    """

    def __init__(self, options: Mapping[str, Any] | Options | None = None) -> None:
        self.options = parse_options(options)
        self.reports: list[Report] = []

    def __call__(
        self, graph: Graph | GraphModule, example_inputs: Any = None, config: Any = None
    ) -> None:
        """Rewrites ``graph``. config: npugraph_ex's, which passes it to its hooks."""
        module = graph if isinstance(graph, GraphModule) else module_of(graph)
        values = [node.meta.get("val") for node in module.graph.find_nodes(op="placeholder")]
        check_devices(self.options.ep_group, values)
        report = Report()
        with net(report, module, values, "it rewrote a graph"):
            self._rewrite(module, values, report, config)
        self.reports.append(report)
        if self.options.on_report is not None:
            self.options.on_report(report)
        log_report(report)
        warn_of_declined(module, values, report, self.options)
        if self.options.strict:
            refuse_missed(report)
        if report.bugs:
            self._agree_to_decline(module)
        elif report.regions and isinstance(graph, GraphModule):
            graph.recompile()

    def _rewrite(
        self, module: GraphModule, values: Sequence[Any], report: Report, config: Any
    ) -> None:
        """In place, once it has been done to a copy: what fails leaves the graph as it was."""
        device = device_for(self.options, values)
        context = passes.Context(
            options=self.options,
            report=report,
            group=self.options.ep_group,
            device=device,
        )
        with neutral():
            result = passes.run(module, context, passes.pipeline(ordered_later=True))
        if result is module or (self.options.strict and report.missed):
            return
        agree_when_run(result, report, self.options.agree_timeout)
        copy = copy_graph(module)
        copied = dict(zip(module.graph.nodes, copy.graph.nodes, strict=True))
        in_copy = {node: copied[old] for node, old in context.origin.items()}
        self._put(copy, result, in_copy, device, replace(report, lowered=[]), config)
        self._put(module, result, context.origin, device, report, config)

    def _put(
        self,
        module: GraphModule,
        result: GraphModule,
        origin: dict[Node, Node],
        device: Plain,
        report: Report,
        config: Any,
    ) -> None:
        splice(module.graph, result, origin)
        if device.lowers:
            self._check_capture(report, config)
        device.finish(module, self.options, report)

    def _agree_to_decline(self, module: GraphModule) -> None:
        """The other ranks must have left the graph as it came too: it exchanges otherwise."""
        groups = groups_in(module)
        if self.options.ep_group is not None:
            groups.add(self.options.ep_group.group_name)
        for name in sorted(groups):
            ensure(name, describe([], training=False), self.options.agree_timeout)

    def _check_capture(self, report: Report, config: Any) -> None:
        """What npugraph_ex captures must not wait for the host."""
        sync = next((plan.capture for plan in report.plans if plan.host_sync), "")
        captures = self.options.base == "npugraph_ex" and not getattr(config, "force_eager", False)
        if sync and captures:
            raise ConfigurationError(
                f"npugraph_ex would capture this graph, but it is {sync}. Use strategy='mc2' or "
                "'allgather' (each rank with the same number of tokens), or npugraph_ex's option "
                "force_eager=True."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> MoEPass:
        """Itself: compilers copy their configuration, but a process group cannot be copied, and the
        reports are to reach whoever made the pass."""
        return self

    def uuid(self) -> str:
        """Key of what this pass does to a graph, for compile caches: the same in every process of
        one configuration; another after an edit of moe_fx, for another torch, other options or
        another place in the process group."""
        described = {
            "moe_fx": __version__,
            "sources": SOURCES,
            "torch": torch.__version__,
            "options": self.options.model_dump(exclude={"ep_group", "on_report", "progress"}),
            "ep_group": _topology(self.options.ep_group),
            "world": _topology(dist.group.WORLD if dist.is_initialized() else None),
        }
        return hashlib.sha256(
            json.dumps(described, sort_keys=True, default=repr).encode()
        ).hexdigest()


_ASK = {
    torch.ops.moe_fx.exchange_counts.default: 1,
    torch.ops.moe_fx.even_sizes.default: 1,
    torch.ops.moe_fx.distribute.default: 3,
    torch.ops.moe_fx.direct_dispatch.default: 4,
    torch.ops.moe_fx.direct_experts.default: NUM_ARGUMENTS + 1,
}
"""Ops that check, before they exchange anything, that the ranks have planned the same, and which
argument their group is; what was planned and how long to wait for others follow it."""


def agree_when_run(result: GraphModule, report: Report, timeout: float) -> None:
    """Nothing runs around the compiled graph, and a cache may bring it back uncompiled: so the
    first exchange of each group checks that the ranks have planned the same."""
    text = describe(report.plans, training=False)
    checked: set[Any] = set()
    for node in result.graph.nodes:
        if node.target in _ASK:
            upto = _ASK[node.target] + 1
            group = node.args[upto - 1]
            if group not in checked:
                checked.add(group)
                node.args = (*node.args[:upto], text, timeout)


def module_of(graph: Graph) -> GraphModule:
    """A module around ``graph`` itself, with what the graph's get_attr nodes read."""
    owner = graph.owning_module
    if isinstance(owner, GraphModule) and owner.graph is graph:
        return owner
    module = GraphModule(owner or nn.Module(), graph)
    graph.owning_module = owner
    return module


def _topology(group: dist.ProcessGroup | None) -> list[Any] | None:
    """What the group is and where this rank stands in it. Gathered weights bring their group with
    the graph; this rank's place in it follows from its place in the world."""
    if group is None:
        return None
    return [group.group_name, group.size(), group.rank(), dist.get_process_group_ranks(group)]
