"""The net: where moe_fx fails unexpectedly, the model is compiled as it would be without it.

Contract. ``with net(report, ...)`` around what moe_fx does to one graph. An exception that is
nobody's intention ends in the report as a `Declined` with its traceback in ``bug``; the caller goes
on with the graph as it came. These pass through: errors on purpose (`moe_fx.errors`), Dynamo's own
signals (it wants the frame again, or not at all), `KeyboardInterrupt` and the like.

With the environment variable ``MOE_FX_NET=0`` nothing is caught, so that tests see bugs.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.fx import GraphModule

from moe_fx.compat import (
    DYNAMO_SIGNALS,
    collective_groups,
    forgetting_new_sizes,
    trace_artefact,
)
from moe_fx.errors import BadInput, ConfigurationError, NothingMatched, RankMissing, RanksDiffer
from moe_fx.graph.selectors import signs
from moe_fx.region import Declined, source_of
from moe_fx.report import Report

__all__ = ["VARIABLE", "groups_in", "log_report", "net", "trace_graph"]

log = logging.getLogger("moe_fx")

VARIABLE = "MOE_FX_NET"
_ON_PURPOSE = (BadInput, ConfigurationError, NothingMatched, RankMissing, RanksDiffer)
_HOW_TO_REPORT = (
    "This is a bug of moe_fx; the graph is compiled as without moe_fx. Please report it with this "
    "report (to_json), the versions of torch and moe_fx, and the model if you can"
)


@contextmanager
def net(report: Report, module: GraphModule, inputs: Sequence[Any], doing: str) -> Iterator[None]:
    """report: of this graph alone; what it says of regions is taken back. module: the graph as it
    came, to say where the failure concerns the model. doing: what failed, if it fails."""
    if os.environ.get(VARIABLE) == "0":
        yield
        return
    try:
        with forgetting_new_sizes(inputs):
            yield
    except (*_ON_PURPOSE, *DYNAMO_SIGNALS):
        raise
    except Exception as error:
        declined = _declined(error, module, doing)
        report.regions, report.plans, report.graphs = [], [], 1
        report.declined.append(declined)


def log_report(report: Report) -> None:
    """Bugs as errors, with their tracebacks; the report for those who want to know; and torch's
    trace (``TORCH_TRACE``) gets it whole."""
    for declined in report.bugs:
        log.error("%s (at %s)\n%s", declined.reason, declined.source, declined.bug)
    log.info("%s", report)
    trace_artefact("moe_fx_report", "json", report.to_json)


def trace_graph(name: str, module: GraphModule) -> None:
    """For torch's trace: the graph, as code with the shapes of its values."""
    trace_artefact(name, "string", lambda: module.print_readable(print_output=False))


def groups_in(module: GraphModule) -> set[str]:
    """The process groups of the collectives in a graph: with those ranks one agrees that it stays
    as it came."""
    return {
        name
        for graph_module in module.modules()
        if isinstance(graph_module, GraphModule)
        for name in collective_groups(graph_module.graph)
    }


def _declined(error: Exception, module: GraphModule, doing: str) -> Declined:
    said = str(error).strip().splitlines()
    summary = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
    at = next(signs(module), None)
    return Declined(
        reason=f"moe_fx failed while {doing}: {summary}. {_HOW_TO_REPORT}",
        node="" if at is None else at.name,
        source="" if at is None else source_of(at),
        bug="".join(traceback.format_exception(error)),
    )
