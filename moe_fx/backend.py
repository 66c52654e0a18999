"""``torch.compile(model, backend="moe_fx", options={...})``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule

import moe_fx.passes as passes
from moe_fx.agree import agree_once
from moe_fx.ambient import neutral
from moe_fx.autocast import switch_off
from moe_fx.bodies import close_bodies, open_bodies
from moe_fx.capture import NotFunctional, capture
from moe_fx.compat import in_compiled_autograd
from moe_fx.devices import device_for
from moe_fx.errors import NothingMatched
from moe_fx.groups import check_device
from moe_fx.local_tensors import Localised, localise
from moe_fx.net import groups_in, log_report, net
from moe_fx.options import ORDERS_LATER, Options, parse_options
from moe_fx.order import compile_by_base
from moe_fx.passes.selectors import may_select_experts
from moe_fx.report import Report


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
    ``module`` goes to the base compiler as it came (`moe_fx.net`).
    """
    parsed = parse_options(options, mode, unknown)
    check_devices(parsed.ep_group, example_inputs)
    report = Report()
    groups: set[str] = set()
    training = is_training(example_inputs)
    local, rewritten = Localised(module, tuple(example_inputs), frozenset()), module
    if in_compiled_autograd():  # a backward pass: what it exchanges is its forward's
        return compile_by_base(module, example_inputs, parsed, report, training)
    compiled: Callable[..., Any] | None = None
    try:
        with net(report, module, example_inputs, "it looked for MoE layers"):
            local, rewritten = rewrite(module, example_inputs, parsed, report, groups)
        _check_strict(report, parsed)
        device = device_for(parsed, local.inputs)
        if rewritten is not module or device.lowers:
            doing = f"{parsed.base} compiled what it made of a graph"
            with net(report, module, example_inputs, doing):
                result = device.compile(rewritten, local.inputs, parsed, report, training)
                compiled = local.wrap(result)
            _check_strict(report, parsed)
        if compiled is None:
            compiled = _as_it_came(module, example_inputs, parsed, report, training)
    finally:
        _announce(report, parsed)
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
) -> tuple[Localised, GraphModule]:
    """``module`` without DTensors, and the expert-parallel graph of it, or itself, untouched, if no
    region was accepted. ``groups`` gets those that it exchanged tokens over as it came."""
    untouched = Localised(module, tuple(example_inputs), frozenset())
    if not may_select_experts(module):
        report.graphs += 1
        return untouched, module
    try:
        opened, bodies = open_bodies(module)
        local = localise(opened, example_inputs)
        captured = capture(local.module, local.inputs)
    except NotFunctional as obstacle:
        report.declined.append(obstacle.declined)
        report.graphs += 1
        return untouched, module
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
        return untouched, module
    if bodies:
        graphs = close_bodies(result, bodies, [region.parts.ids for region in context.regions])
        if not later:
            for graph in graphs:
                passes.Overlap()(graph, context)
    switch_off(result)
    return local, result


def _announce(report: Report, options: Options) -> None:
    """To whoever asked for it, and to the log."""
    if options.on_report is not None:
        options.on_report(report)
    log_report(report)


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


def _check_strict(report: Report, options: Options) -> None:
    """Raises `NothingMatched` under ``strict``."""
    if options.strict and (report.missed or not report.regions):
        found = "; ".join(f"{d.reason} (at {d.source})" for d in report.missed)
        raise NothingMatched(
            f"strict=True: {len(report.regions)} MoE layers were rewritten, but not every "
            f"candidate was: {found or 'the graph selects no experts'}. Use "
            "moe_fx.explain(model, *args) to see each candidate, or strict=False to run what did "
            "not match as it is."
        )
