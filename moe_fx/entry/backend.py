"""``torch.compile(model, backend="moe_fx", options={...})``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule

import moe_fx.passes as passes
from moe_fx.bases.inductor import compile_by_base
from moe_fx.capture.autocast import switch_off
from moe_fx.capture.bodies import close_bodies, open_bodies
from moe_fx.capture.capture import NotFunctional, capture
from moe_fx.capture.local_tensors import Localised, localise
from moe_fx.compat import in_compiled_autograd, say_what_dynamo_said
from moe_fx.devices import device_for
from moe_fx.entry.ambient import neutral
from moe_fx.entry.announce import Announcement
from moe_fx.entry.net import groups_in, net, trace_graph
from moe_fx.entry.strict import refuse_missed, refuse_model
from moe_fx.entry.tracing import (
    captured_in_vain,
    install,
    note_breaks,
    outside,
    seen_whole,
    sees_frames,
)
from moe_fx.graph.selectors import may_select_experts
from moe_fx.options import ORDERS_LATER, Options, parse_options
from moe_fx.ranks.agree import agree_once
from moe_fx.ranks.groups import check_device
from moe_fx.report import Report

install()


@sees_frames
def moe_fx_backend(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """The backend. ``module`` is Dynamo's graph; returns what runs in its place. ``mode``: as the
    option of that name; torch.compile passes it, as it takes no options beside it.

    Raises `ConfigurationError` for options that do not fit the model or group, and
    `NothingMatched` under ``strict``. Where moe_fx fails otherwise, the report says so, and
    ``module`` goes to the base compiler as it came (`moe_fx.entry.net`). Raises `CaptureAgain`
    where Dynamo captured more than without moe_fx, and nothing was made of it
    (`moe_fx.entry.tracing`).
    """
    with outside():
        return _compile(module, example_inputs, options, mode, unknown)


def _compile(
    module: GraphModule,
    example_inputs: Sequence[Any],
    options: Mapping[str, Any] | Options | None,
    mode: str | None,
    unknown: Mapping[str, Any],
) -> Callable[..., Any]:
    parsed = parse_options(options, mode, unknown)
    check_devices(parsed.ep_group, example_inputs)
    report = Report()
    groups: set[str] = set()
    training = is_training(example_inputs)
    local, rewritten = Localised(module, tuple(example_inputs), frozenset()), module
    larger = False
    if in_compiled_autograd():  # a backward pass: what it exchanges is its forward's
        return compile_by_base(module, example_inputs, parsed, report, training)
    compiled: Callable[..., Any] | None = None
    with Announcement(module, example_inputs, report, parsed) as said:
        with net(report, module, example_inputs, "it looked for MoE layers"):
            local, rewritten, larger = rewrite(module, example_inputs, parsed, report, groups)
            said.graph = rewritten
        if report.bugs or not larger:
            captured_in_vain(module, report)
        note_breaks(module, report)
        whole = seen_whole(module, report)
        if parsed.strict:
            refuse_missed(report)
            if whole is not None:
                refuse_model(whole)
        device = device_for(parsed, local.inputs)
        if rewritten is not module or device.lowers:
            doing = f"{parsed.base} compiled what it made of a graph"
            with net(report, module, example_inputs, doing), said.base_compiles():
                say_what_dynamo_said(rewritten, module)
                result = device.compile(rewritten, local.inputs, parsed, report, training)
                compiled = local.wrap(result)
            if parsed.strict:
                refuse_missed(report)
        if compiled is None:
            captured_in_vain(module, report)
            with said.base_compiles():
                compiled = _as_it_came(module, example_inputs, parsed, report, training)
    if report.bugs:
        groups |= groups_in(module)
    groups |= {plan.group_name for plan in report.plans if plan.group_name}
    if parsed.ep_group is not None and (report.regions or report.declined):
        groups.add(parsed.ep_group.group_name)
    if groups:
        compiled = agree_once(compiled, groups, report.plans, training, parsed.agree_timeout)
    return compiled


def _as_it_came(
    module: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    report: Report,
    training: bool,
) -> Callable[..., Any]:
    """``module`` compiled as without moe_fx. Where that fails too, the failure is none of its."""
    try:
        return compile_by_base(module, example_inputs, options, report, training)
    except Exception:
        report.declined = [declined for declined in report.declined if not declined.bug]
        raise


def rewrite(
    module: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    report: Report,
    groups: set[str],
) -> tuple[Localised, GraphModule, bool]:
    """``module`` without DTensors; the expert-parallel graph of it, or itself, untouched, if no
    region was accepted; whether a region needs data-dependent sizes. ``groups`` gets those that it
    exchanged tokens over as it came."""
    untouched = Localised(module, tuple(example_inputs), frozenset())
    if not may_select_experts(module):
        report.graphs += 1
        return untouched, module, False
    try:
        opened, bodies = open_bodies(module)
        local = localise(opened, example_inputs)
        captured = capture(local.module, local.inputs)
    except NotFunctional as obstacle:
        report.declined.append(obstacle.declined)
        report.graphs += 1
        return untouched, module, False
    trace_graph("moe_fx_graph_before", captured)
    device = device_for(options, local.inputs)
    context = passes.Context(
        options=options,
        report=report,
        group=options.ep_group,
        training=is_training(local.inputs),
        measures=True,
        exchange_groups=groups,
        device=device,
    )
    later = options.base in ORDERS_LATER or device.lowers
    with neutral():
        result = passes.run(captured, context, passes.pipeline(later or bool(bodies)))
    if result is captured:
        return untouched, module, False
    if bodies:
        graphs = close_bodies(result, bodies, [region.parts.ids for region in context.regions])
        if not later:
            for graph in graphs:
                passes.Overlap()(graph, context)
    switch_off(result)
    trace_graph("moe_fx_graph_after", result)
    return local, result, context.holds_new_sizes


def is_training(example_inputs: Sequence[Any]) -> bool:
    """The base compiler will differentiate a graph with these inputs."""
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in example_inputs
    )


def check_devices(group: dist.ProcessGroup | None, example_inputs: Sequence[Any]) -> None:
    """The group's backend must serve the device the model is on."""
    if group is not None:
        for value in example_inputs:
            if isinstance(value, Tensor) and value.dim() > 0:
                check_device(value.device, "The model", group)
