"""What ``strict=True`` refuses, and when.

At once: a graph with a layer that may be missed (`Report.missed`), and a function that Dynamo gives
up between the selection of experts and the experts. Of the model as a whole, when its outermost
function has been compiled to its end, behind all graph breaks: that no graph had a layer, or that
experts which a break parted from their selection were found in none. Nothing is heard of the end
of an outermost function that Dynamo gives up: there only the former is seen, unlike in `explain`.
"""

from __future__ import annotations

from moe_fx.errors import NothingMatched
from moe_fx.report import Report

__all__ = ["refuse_missed", "refuse_model"]

_SEE = (
    "moe_fx.explain(model, *args) lists every candidate and every graph break; strict=False runs "
    "what did not match as it is."
)


def refuse_missed(report: Report) -> None:
    """Raises `NothingMatched` if ``report``, of one graph or function, has a layer that may be
    missed."""
    found = [f"{d.reason} (at {d.source})" for d in report.missed]
    if found:
        raise NothingMatched(f"strict=True: MoE layers may be missed: {'; '.join(found)}. {_SEE}")


def refuse_model(report: Report) -> None:
    """Raises `NothingMatched` if ``report``, of all graphs of a model, has no layer, or experts are
    hidden."""
    found = [each for each in report.breaks if each.hides or not report.regions]
    said = "; ".join(f"{each.said} (at {each.source})" for each in found)
    if report.hidden:
        raise NothingMatched(
            f"strict=True: graph breaks hide the experts that are selected at "
            f"{' and '.join(report.hidden)}: {said} {_SEE}"
        )
    if not report.regions:
        behind = f", and graph breaks part it: {said}" if said else ""
        raise NothingMatched(
            f"strict=True: no MoE layer was found: no graph of the model selects experts{behind}. "
            f"{_SEE}"
        )
