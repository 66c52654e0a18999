"""What was found, what was declined and why: as data, table, JSON and one HTML page.

JSON is described by a schema (`Report.json_schema`) that is made from the dataclasses themselves.
"""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from rich.console import Console

from moe_fx.plan import ExchangePlan
from moe_fx.region import Break, Declined, Lowered, Region
from moe_fx.report import schema as report_schema
from moe_fx.report.breaks import joined
from moe_fx.report.html import page
from moe_fx.report.rows import Rows

_WIDTH = 120
_PARTS = ("experts", "router")
"""Of a layer, what a device may have one op for."""


def _versions() -> dict[str, str]:
    from moe_fx.version import __version__

    found = {"moe_fx": __version__, "torch": torch.__version__}
    if "transformers" in sys.modules:
        found["transformers"] = sys.modules["transformers"].__version__
    return found


@dataclass
class Report:
    """regions, declined: in graph order. plans: one per region that is not "exchanged" already.
    pass_seconds: wall time of each pass. graphs: how many captured graphs this report covers.
    lowered: layers whose experts or routers a device's ops could be, and what they are; of each
    graph that a device's compiler made of these, its dialect ops, filled when that compiles its
    graphs, which may be after ``on_report``. notes: what moe_fx has changed of the
    compilation beside the layers, and why. breaks: where Dynamo ended a graph, or gave a function
    up. model: class or function that was compiled. versions: of moe_fx, torch and, if it is in use,
    transformers. expert_parameters: of `moe_fx.explain`, the names of the
    parameters that proved to hold one expert a row, for `moe_fx.shard_experts` (``params=``)."""

    regions: list[Region] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    plans: list[ExchangePlan] = field(default_factory=list)
    pass_seconds: dict[str, float] = field(default_factory=dict)
    graphs: int = 0
    lowered: list[Lowered] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    breaks: list[Break] = field(default_factory=list)
    model: str = ""
    versions: dict[str, str] = field(default_factory=_versions)
    expert_parameters: list[str] = field(default_factory=list)

    def record_pass(self, name: str, seconds: float) -> None:
        self.pass_seconds[name] = self.pass_seconds.get(name, 0.0) + seconds

    def extend(self, other: Report) -> None:
        """Add what another graph's report says."""
        self.regions += other.regions
        self.declined += other.declined
        self.plans += other.plans
        self.graphs += other.graphs
        self.model = self.model or other.model
        self.lowered += other.lowered
        self.notes += other.notes
        self.breaks = joined([*self.breaks, *other.breaks])
        known = set(self.expert_parameters)
        self.expert_parameters += [n for n in other.expert_parameters if n not in known]
        for name, seconds in other.pass_seconds.items():
            self.record_pass(name, seconds)

    @property
    def bugs(self) -> list[Declined]:
        """Where moe_fx itself failed, and left the graph as it came."""
        return [declined for declined in self.declined if declined.bug]

    @property
    def missed(self) -> list[Declined]:
        """The declined candidates that may be MoE layers: what ``strict`` refuses."""
        return [declined for declined in self.declined if declined.reads_experts]

    @property
    def kept(self) -> list[str]:
        """Whose experts or routers the device has an op for that does not fit, and why."""
        found = Counter((each.op, each.kept) for each in self.lowered if each.op in _PARTS)
        return [
            f"{op} of {count} layer{'s' * (count > 1)} not fused: {why}"
            for (op, why), count in found.items()
            if why
        ]

    @property
    def about(self) -> str:
        """The model and the versions."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.model}; {versions}" if self.model else versions

    @property
    def hidden(self) -> list[str]:
        """Where experts are selected that a graph break hides, and that no layer of this report
        shows (one whose ids come from outside of its graph may be such a layer)."""
        hidden = [source for each in self.breaks for source in each.hides]
        shown = sum(region.router.selection == "lookup" for region in self.regions)
        return hidden[shown:]

    @property
    def nothing(self) -> str:
        """Why nothing was found, neither layers nor candidates; "" if there is something."""
        if self.regions or self.declined:
            return ""
        if not self.graphs:
            why = "Dynamo captured no graph, so that moe_fx has seen nothing of the model"
        else:
            why = "no graph selects experts"
        if any(each.hides for each in self.breaks):
            why = "graph breaks part the routers from their experts"
        elif self.breaks:
            why += "; what is behind a graph break may not be compiled"
        return f"No MoE layer found: {why}."

    def to_dict(self) -> dict[str, Any]:
        """What `to_json` writes."""
        return {
            "version": report_schema.VERSION,
            "model": self.model,
            "versions": self.versions,
            "graphs": self.graphs,
            "regions": [_region_dict(region) for region in self.regions],
            "declined": [asdict(declined) for declined in self.declined],
            "plans": [asdict(plan) | {"host_sync": plan.host_sync} for plan in self.plans],
            "pass_seconds": self.pass_seconds,
            "lowered": [asdict(each) for each in self.lowered],
            "notes": self.notes,
            "breaks": [asdict(each) for each in self.breaks],
            "expert_parameters": self.expert_parameters,
        }

    def to_text(self) -> str:
        """One line per region and declined candidate, with whole paths: for messages and logs."""
        lines = [f"MoE layers found: {len(self.regions)}, declined: {len(self.declined)}"]
        lines.append(self.about)
        lines += [
            f"- {_line(region)}\n  at {_place(region.module, region.source)}"
            for region in self.regions
        ]
        summaries = Counter(plan.summary for plan in self.plans)
        lines += [f"- {count} planned: {summary}" for summary, count in summaries.items()]
        lines += [
            f"- declined: {d.reason}\n  at node {d.node}, "
            + _place(d.module, d.source or "source unknown")
            + (f", nearest form {d.nearest_form}" if d.nearest_form else "")
            + (f"\n{indent(d.bug, '  | ')}" if d.bug else "")
            for d in self.declined
        ]
        lines += [f"- {kept}" for kept in self.kept]
        lines += [f"- note: {note}" for note in self.notes]
        lines += [f"- graph break: {each.text}\n  at {each.source}" for each in self.breaks]
        if self.nothing:
            lines.append(self.nothing)
        return "\n".join(lines)

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text as `json_schema` says; also written to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """The JSON schema (draft 2020-12) of `to_json`: docs/report.md."""
        return report_schema.json_schema(Report.__doc__ or "")

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained HTML page: per region its source, its nodes before and after the
        rewrite and what was verified; per declined candidate the reason and its source. Also
        written to ``path`` if one is given. Source lines are read from the files now."""
        found = (self.regions, self.declined, self.plans, self.notes, self.breaks)
        text = page(*found, self.nothing, self.about)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def print(self, console: Console | None = None) -> None:
        console = console or Console()
        console.print(self.about, markup=False, highlight=False)
        if self.regions:
            console.print(self._regions_table())
        if self.declined:
            console.print(self._declined_table())
        for kept in self.kept:
            console.print(kept, markup=False, highlight=False)
        for note in self.notes:
            console.print(f"Note: {note}", markup=False, highlight=False)
        if self.breaks:
            console.print(self._breaks_table())
        if self.nothing:
            console.print(self.nothing, markup=False, highlight=False)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH)
        self.print(console)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    def _regions_table(self) -> Rows:
        headings = ("layer", "experts", "router", "body", "dispatch", "plan", "verified", "source")
        table = Rows(f"MoE layers found: {len(self.regions)}", headings)
        plans = [plan.summary for plan in self.plans]
        plans += [""] * (len(self.regions) - len(plans))
        for region, plan in zip(self.regions, plans, strict=False):
            table.add_row(
                region.module,
                f"{region.top_k} of {region.num_experts}, hidden {region.hidden_size}",
                _router_text(region),
                region.activation + (" + shared" if region.has_shared_expert else ""),
                f"{region.form}, {region.program}",
                plan,
                _verified_text(region),
                _short(region.source),
            )
        return table

    def _breaks_table(self) -> Rows:
        headings = ("Dynamo's reason", "hides the experts selected at", "source")
        table = Rows(f"Graph breaks: {len(self.breaks)}", headings)
        for each in self.breaks:
            hides = ", ".join(map(_short, each.hides))
            table.add_row(each.said, hides, _short(each.source))
        return table

    def _declined_table(self) -> Rows:
        bugs = f" ({len(self.bugs)} by a bug of moe_fx)" if self.bugs else ""
        headings = ("reason", "module", "node", "nearest form", "source")
        table = Rows(f"Declined: {len(self.declined)}{bugs}", headings)
        for declined in self.declined:
            table.add_row(
                declined.reason,
                declined.module,
                declined.node,
                declined.nearest_form,
                _short(declined.source),
            )
        return table


def _region_dict(region: Region) -> dict[str, Any]:
    plain = {name: getattr(region, name) for name in report_schema.names(Region)}
    verification = None if region.verification is None else asdict(region.verification)
    effects = [asdict(effect) for effect in region.effects]
    return plain | {
        "router": asdict(region.router),
        "verification": verification,
        "effects": effects,
    }


def _line(region: Region) -> str:
    return (
        f"{region.top_k} of {region.num_experts} experts, hidden {region.hidden_size}; router: "
        f"{_router_text(region)}; body: {region.activation}; {region.form}, {region.program}; "
        f"verified: {_verified_text(region)}"
    )


def _place(module: str, source: str) -> str:
    return f"{module}, {source}" if module else source


def _verified_text(region: Region) -> str:
    seen = region.verification
    if seen is None:
        return "yes" if region.verified else "no"
    ranks = "1 rank" if seen.ranks == 1 else f"{seen.ranks} ranks"
    return f"{ranks}, within {seen.max_difference:.0e}"


def _router_text(region: Region) -> str:
    router = region.router
    parts = [router.score]
    if router.selection != "topk":
        parts.append(f"by {router.selection}")
    if router.select_bias:
        parts.append("bias")
    if router.num_groups > 1:
        parts.append(f"groups {router.topk_group}/{router.num_groups}")
    if router.renormalise:
        parts.append("renorm with shared" if router.shared_columns else "renorm")
    if router.scale != 1.0:
        parts.append(f"×{router.scale:g}")
    if router.learned_scale:
        parts.append("×learned")
    if router.expert_scale:
        parts.append("×expert's")
    if router.zero_experts:
        parts.append(f"{router.zero_experts} zero")
    return " ".join(parts)


def _short(source: str) -> str:
    """File and line without the folders: narrow enough for a table."""
    return source.rsplit("/", 1)[-1]
