"""What every pass is: ``(GraphModule, Context) -> PassResult``, timed, never printing."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import final

import torch.distributed as dist
from torch.fx import GraphModule, Node

from moe_fx.device import Device
from moe_fx.options import Options
from moe_fx.plan import ExchangePlan
from moe_fx.region import Region
from moe_fx.report import Report


@dataclass(frozen=True)
class StandIn:
    """``result``, computed by ``nodes``, in place of ``captured``, which is of equal value
    (`passes/recognise/exchanged/unexchange.py`). gathers: of the nodes, waited-for all-gathers of
    ``shards``. replaced: the nodes that compute ``captured``."""

    captured: Node
    result: Node
    nodes: tuple[Node, ...]
    gathers: tuple[Node, ...]
    shards: tuple[Node, ...]
    replaced: tuple[Node, ...]


@dataclass
class Context:
    """What passes share while they work on one graph.

    group: the expert-parallel group from the options; a *gathered* program brings its own.
    training: the graph will be differentiated.
    measures: all ranks run the passes on this graph now, so that they may measure and decide
        together.
    device: what the graph is for.
    regions: filled by recognise, thinned by verify; plans: one per region, filled by plan.
    origin: filled by normalise; node of the normalised copy -> the captured node of equal value.
    claimed: selections that need no further look: their region exchanges tokens itself.
    stand_ins: filled by unexchange; the rewrite drops those that no region came of.
    holds_new_sizes: set by new_sizes: an op with a data-dependent size stands within a region.
    exchange_groups: those of dispatchers in the graph, whose ranks must agree whatever is made of
        them.
    """

    options: Options
    report: Report
    group: dist.ProcessGroup | None = None
    training: bool = False
    measures: bool = False
    device: Device = field(default_factory=Device)
    regions: list[Region] = field(default_factory=list)
    plans: list[ExchangePlan] = field(default_factory=list)
    origin: dict[Node, Node] = field(default_factory=dict)
    claimed: set[Node] = field(default_factory=set)
    stand_ins: list[StandIn] = field(default_factory=list)
    holds_new_sizes: bool = False
    exchange_groups: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class PassResult:
    module: GraphModule
    changed: bool


class Pass(ABC):
    """Subclasses write `_apply`; `__call__` is final so that no pass can forget its bookkeeping."""

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @final
    def __call__(self, module: GraphModule, context: Context) -> PassResult:
        start = time.perf_counter()
        result = self._apply(module, context)
        context.report.record_pass(self.name, time.perf_counter() - start)
        return result

    @abstractmethod
    def _apply(self, module: GraphModule, context: Context) -> PassResult: ...
