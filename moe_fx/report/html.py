"""The report as one HTML page that needs nothing else: ``moe_fx/report/templates/report.html``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moe_fx.plan import ExchangePlan
from moe_fx.region import Break, Declined, Region, Step
from moe_fx.report.source_text import Excerpt, Sources, style_sheet

PARTS = ("router", "dispatch", "experts", "combine")
_PLUMBING = (
    *("getitem", "aten.sym_size.int", "aten.select.int", "aten.slice.Tensor", "aten.cumsum"),
    *("aten.sum.dim_IntList", "aten.view", "aten.reshape", "aten.transpose.int", "aten.unsqueeze"),
    *("aten.squeeze.dim", "aten.split.Tensor", "aten._to_copy", "aten.clone"),
)
"""Left out of the one-line picture of what the rewritten region does."""
_AROUND_SELECTION, _AROUND_STEP = 4, 1


@dataclass(frozen=True)
class _Part:
    """One of `PARTS`: its nodes, and the source lines that made them."""

    name: str
    steps: tuple[Step, ...]
    excerpts: list[Excerpt]


@dataclass(frozen=True)
class _Layers:
    """Regions that are alike in all that the page says, shown once."""

    numbers: list[int]
    regions: list[Region]
    plan: ExchangePlan | None
    selection: list[Excerpt]
    parts: list[_Part]

    @property
    def region(self) -> Region:
        return self.regions[0]

    @property
    def after(self) -> tuple[Step, ...]:
        return self.region.listing.after if self.region.listing else ()

    @property
    def flow(self) -> list[Step]:
        return [step for step in self.after if step.op not in _PLUMBING]


def page(
    regions: Sequence[Region],
    declined: Sequence[Declined],
    plans: Sequence[ExchangePlan],
    notes: Sequence[str],
    breaks: Sequence[Break],
    nothing: str,
    about: str,
) -> str:
    """``plans``: one per region, or none."""
    sources = Sources()
    environment = Environment(
        loader=PackageLoader("moe_fx.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = _short
    return environment.get_template("report.html").render(
        regions=regions,
        layers=list(_alike(regions, plans, sources)),
        declined=[(d, sources.excerpts([d.source], _AROUND_SELECTION)) for d in declined],
        notes=notes,
        nothing=nothing,
        about=about,
        breaks=[(each, sources.excerpts([each.source], _AROUND_SELECTION)) for each in breaks],
        light=Markup(style_sheet("default", ".code")),
        dark=Markup(style_sheet("github-dark", ".code")),
    )


def _alike(
    regions: Sequence[Region], plans: Sequence[ExchangePlan], sources: Sources
) -> Iterable[_Layers]:
    groups: dict[object, list[int]] = {}
    for at, region in enumerate(regions):
        plan = plans[at] if at < len(plans) else None
        groups.setdefault(_appearance(region, plan), []).append(at)
    for members in groups.values():
        first = regions[members[0]]
        yield _Layers(
            numbers=[at + 1 for at in members],
            regions=[regions[at] for at in members],
            plan=plans[members[0]] if members[0] < len(plans) else None,
            selection=sources.excerpts([first.source], _AROUND_SELECTION),
            parts=_parts(first, sources),
        )


def _appearance(region: Region, plan: ExchangePlan | None) -> object:
    """What two regions have in common if they are one on the page: all but names of nodes."""
    steps: tuple[Step, ...] = ()
    if region.listing is not None:
        steps = region.listing.before + region.listing.after
    look = tuple((step.part, step.op, step.shape, step.source) for step in steps)
    fields = (region.num_experts, region.top_k, region.hidden_size, region.router, region.form)
    more = (region.program, region.activation, region.has_shared_expert, region.source)
    return fields, more, region.verified, plan, look


def _parts(region: Region, sources: Sources) -> list[_Part]:
    before = region.listing.before if region.listing is not None else ()
    parts = []
    for name in PARTS:
        steps = tuple(step for step in before if step.part == name)
        if steps:
            excerpts = sources.excerpts((step.source for step in steps), _AROUND_STEP)
            parts.append(_Part(name, steps, excerpts))
    return parts


def _short(source: str) -> str:
    """The last three folders of a path are enough to know it."""
    folders = source.split("/")
    return source if len(folders) <= 4 else "…/" + "/".join(folders[-3:])
