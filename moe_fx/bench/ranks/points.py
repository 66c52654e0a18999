"""What was measured at one point on all ranks, and the table of all points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_fx.bench.model_runs import MOST_APART
from moe_fx.bench.points import quotient
from moe_fx.bench.ranks.programs import CAPTURED, HF_COMPILED, PROGRAMS
from moe_fx.bench.reference import TOLERANCE


@dataclass
class RankPoint:
    """Times in seconds, of the slower rank.

    tokens: of each rank. decodes: a step of decode of a two-layer model, of a batch of so many.
    routing: "uniform" or "zipf". samples: of each program, each round; a CUDA graph of it under
    ``<program>_graph``. errors: from the block on one GPU, the largest of any rank. failed: why a
    program was not timed, or is not right. plans: of moe_fx's programs.
    """

    layer: str
    tokens: int
    routing: str
    training: bool
    ranks: int
    decodes: bool = False
    samples: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    plans: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        if self.decodes:
            return f"{self.layer}, two-layer model, decode, batch {self.tokens} a rank"
        how = ", forward + backward" if self.training else ""
        return f"{self.layer}, {self.tokens} tokens a rank, {self.routing}{how}"

    def seconds(self, name: str) -> float | None:
        values = self.samples.get(name)
        return median(values) if values else None

    def faster(self, name: str) -> float | None:
        """How many times faster than transformers' expert parallelism compiled."""
        return quotient(self.seconds(HF_COMPILED), self.seconds(name))

    def judge(self) -> None:
        allowed = MOST_APART if self.decodes else TOLERANCE
        for name, error in self.errors.items():
            if not error <= allowed:
                self.failed[name] = f"wrong: {error:.1e} from one GPU's result, relative"

    @property
    def wrong(self) -> list[str]:
        """What failed of ours."""
        theirs = ("hf_eager", HF_COMPILED)
        return [f"{self.title}: {n}: {why}" for n, why in self.failed.items() if n not in theirs]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "medians": {name: self.seconds(name) for name in self.samples},
            "faster_than_hf": {name: self.faster(name) for name in self.samples},
        }


def show(points: Sequence[RankPoint], name: str, console: Console) -> None:
    """All points in one table, µs, and how many times faster than transformers compiled."""
    columns = [*PROGRAMS, *(f"{each}_graph" for each in CAPTURED)]
    shown = [each for each in columns if any(each in point.samples for point in points)]
    table = Table(title=f"{escape(name)}, µs (times faster than HF AllToAllEP compiled)")
    table.add_column("layer, tokens a rank")
    for each in shown:
        heading = PROGRAMS.get(each) or f"{each.removesuffix('_graph')}, CUDA graph"
        table.add_column(heading, justify="right")
    for point in points:
        table.add_row(escape(point.title), *(_cell(point, each) for each in shown))
    console.print(table)
    for point in points:
        for program, reason in point.failed.items():
            console.print(f"[red]{escape(f'{point.title}: {program}: {reason}')}", highlight=False)


def _cell(point: RankPoint, name: str) -> str:
    seconds, faster = point.seconds(name), point.faster(name)
    if seconds is None:
        return "-"
    text = f"{1e6 * seconds:.0f}"
    return text if faster is None or name == HF_COMPILED else f"{text} ({faster:.2f})"
