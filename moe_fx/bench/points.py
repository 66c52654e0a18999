"""What was measured at one point of the table, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from moe_fx.bench.reference import TOLERANCE

HF, OURS, HF_GRAPH, OURS_GRAPH = "hf", "ours", "hf_graph", "ours_graph"
MEASURING = "measuring"
"""In `Point.failed`: what none of the programs is to blame for."""
TITLES = {
    HF: "HF compiled",
    OURS: "moe_fx",
    HF_GRAPH: "HF compiled, CUDA graph",
    OURS_GRAPH: "moe_fx, CUDA graph",
    MEASURING: "measuring",
}
AGAINST = {OURS: HF, OURS_GRAPH: HF_GRAPH}


@dataclass
class Part:
    """A kernel of ours. seconds: a call of the layer, of all its launches together."""

    name: str
    seconds: float
    launches: float


@dataclass
class Point:
    """One point. Times in seconds.

    kind: "forward", "training", "prefill" or "decode". tokens: in one call. hit: experts that got
    one. floor_flops, floor_bytes: the two times whose longer one is the floor. samples: of each
    program (`TITLES`), the median of each round. errors: from float64, relative; of models, from
    HF compiled in place of that. apart: ours from HF compiled, on all tokens whose selection does
    not hang on rounding. failed: why a program was not timed, or is not right. plan: how ours runs
    the layer. parts: of ours, by kernel. compile_seconds: of the first call.
    """

    layer: str
    kind: str
    tokens: int
    hit: int = 0
    floor_flops: float | None = None
    floor_bytes: float | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    apart: float | None = None
    failed: dict[str, str] = field(default_factory=dict)
    plan: str = ""
    parts: list[Part] = field(default_factory=list)
    compile_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        what = {
            "forward": f"{self.tokens} tokens",
            "training": f"forward + backward, {self.tokens} tokens",
            "prefill": f"prefill, {self.tokens} tokens",
            "decode": f"decode, batch {self.tokens}",
        }
        return f"{self.layer}, {what[self.kind]}"

    @property
    def floor(self) -> float | None:
        if self.floor_flops is None or self.floor_bytes is None:
            return None
        return max(self.floor_flops, self.floor_bytes)

    def seconds(self, name: str) -> float | None:
        """The median of the rounds."""
        values = self.samples.get(name)
        return median(values) if values else None

    def ratio(self, ours: str) -> float | None:
        """Time of ``ours`` over that of HF run the same way: under 1 is faster."""
        return quotient(self.seconds(ours), self.seconds(AGAINST[ours]))

    def over_floor(self, name: str) -> float | None:
        return quotient(self.seconds(name), self.floor)

    def judge(self) -> None:
        """Note in ``failed`` which program of ours is not right, by ``errors`` and ``apart``."""
        for name, other in AGAINST.items():
            error, theirs = self.errors.get(name), self.errors.get(other, 0.0)
            allowed = max(TOLERANCE, 2 * theirs if math.isfinite(theirs) else 0.0)
            if error is not None and not error <= allowed:
                self.failed[name] = (
                    f"wrong: {error:.1e} from float64, relative; HF's is {theirs:.1e}"
                )
        if self.apart is not None and not self.apart <= 2 * TOLERANCE:
            self.failed.setdefault(OURS, f"wrong: {self.apart:.1e} from HF's result, relative")

    @property
    def wrong(self) -> list[str]:
        """What failed of ours, or could not be measured, for people."""
        names = [name for name in (*AGAINST, MEASURING) if name in self.failed]
        return [f"{self.title}: {TITLES[name]}: {self.failed[name]}" for name in names]

    def to_dict(self) -> dict[str, Any]:
        medians = {name: self.seconds(name) for name in self.samples}
        derived = {
            "medians": medians,
            "floor": self.floor,
            "ours_over_hf": {name: self.ratio(name) for name in AGAINST},
            "over_floor": {name: self.over_floor(name) for name in medians},
        }
        return {name: _json(value) for name, value in (asdict(self) | derived).items()}


def quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _json(value: Any) -> Any:
    """JSON has no infinity: what is not finite is written as text."""
    if isinstance(value, dict):
        return {name: _json(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_json(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
