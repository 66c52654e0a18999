"""What was found, what was declined and why: as data, table, JSON and one HTML page."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_fx.plan import ExchangePlan
from moe_fx.region import Declined, Region

_WIDTH = 120


@dataclass
class Report:
    """regions, declined: in graph order. plans: one per region that is not "exchanged" already.
    pass_seconds: wall time of each pass. graphs: how many captured graphs this report covers."""

    regions: list[Region] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    plans: list[ExchangePlan] = field(default_factory=list)
    pass_seconds: dict[str, float] = field(default_factory=dict)
    graphs: int = 0

    def record_pass(self, name: str, seconds: float) -> None:
        self.pass_seconds[name] = self.pass_seconds.get(name, 0.0) + seconds

    def extend(self, other: Report) -> None:
        """Add what another graph's report says."""
        self.regions += other.regions
        self.declined += other.declined
        self.plans += other.plans
        self.graphs += other.graphs
        for name, seconds in other.pass_seconds.items():
            self.record_pass(name, seconds)

    def to_dict(self) -> dict[str, Any]:
        return {
            "graphs": self.graphs,
            "regions": [_region_dict(region) for region in self.regions],
            "declined": [asdict(declined) for declined in self.declined],
            "plans": [asdict(plan) | {"host_sync": plan.host_sync} for plan in self.plans],
            "pass_seconds": self.pass_seconds,
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; also written to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text)
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained HTML page with the tables of ``str(report)``; also written to
        ``path`` if one is given."""
        console = Console(record=True, width=_WIDTH, file=io.StringIO())
        self.print(console)
        text = console.export_html()
        if path is not None:
            Path(path).write_text(text)
        return text

    def print(self, console: Console | None = None) -> None:
        console = console or Console()
        if self.regions:
            console.print(self._regions_table())
        if self.declined:
            console.print(self._declined_table())
        if not self.regions and not self.declined:
            console.print("No MoE layer found: no graph selects experts with a top-k.")

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH)
        self.print(console)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    def _regions_table(self) -> Table:
        table = Table(title=f"MoE layers found: {len(self.regions)}", show_lines=False)
        for heading in ("experts", "router", "body", "dispatch", "verified", "source"):
            table.add_column(heading, overflow="fold")
        for region in self.regions:
            table.add_row(
                f"{region.top_k} of {region.num_experts}, hidden {region.hidden_size}",
                _router_text(region),
                region.activation + (" + shared" if region.has_shared_expert else ""),
                f"{region.form}, {region.program}",
                "yes" if region.verified else "no",
                _short(region.source),
            )
        return table

    def _declined_table(self) -> Table:
        table = Table(title=f"Declined: {len(self.declined)}")
        for heading in ("reason", "node", "nearest form", "source"):
            table.add_column(heading, overflow="fold")
        for declined in self.declined:
            table.add_row(
                declined.reason, declined.node, declined.nearest_form, _short(declined.source)
            )
        return table


def _region_dict(region: Region) -> dict[str, Any]:
    plain = {f.name: getattr(region, f.name) for f in fields(region) if f.name != "parts"}
    return plain | {"router": asdict(region.router)}


def _router_text(region: Region) -> str:
    router = region.router
    parts = [router.score]
    if router.select_bias:
        parts.append("bias")
    if router.num_groups > 1:
        parts.append(f"groups {router.topk_group}/{router.num_groups}")
    if router.renormalise:
        parts.append("renorm")
    if router.scale != 1.0:
        parts.append(f"×{router.scale:g}")
    return " ".join(parts)


def _short(source: str) -> str:
    """File and line without the folders: narrow enough for a table."""
    return source.rsplit("/", 1)[-1]
