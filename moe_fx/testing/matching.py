"""Assertions on what is found in a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from moe_fx.entry.explain import explain
from moe_fx.options import Options
from moe_fx.region import Declined, Region, Router
from moe_fx.report import Report

_OF_REGION = tuple(f.name for f in fields(Region) if f.name not in ("router", "parts", "listing"))
_OF_ROUTER = tuple(f.name for f in fields(Router))


def assert_matches(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_experts: int | None = None,
    top_k: int | None = None,
    layers: int = 1,
    router: Mapping[str, Any] | Router | None = None,
    ranks: int | None = None,
    dynamic: bool | None = None,
    options: Mapping[str, Any] | Options | None = None,
    **expected: Any,
) -> Report:
    """``fn(*args, **kwargs)`` has ``layers`` MoE layers, each with the fields given.

    router: some fields of `moe_fx.Router`, or all. expected: other fields of `moe_fx.Region`, such
    as ``form="grouped_mm"``. ranks: verify for so many ranks; dynamic, options: as in
    `moe_fx.explain`, whose report is returned.

    Raises AssertionError with what differs and the report: each layer, and each candidate that was
    declined, with reason and source. TypeError if there is no such field.
    """
    wanted = {"num_experts": num_experts, "top_k": top_k}
    wanted = {name: value for name, value in wanted.items() if value is not None} | expected
    _check_names(wanted, _OF_REGION, "Region")
    if isinstance(router, Router):
        router = {name: getattr(router, name) for name in _OF_ROUTER}
    of_router = dict(router or {})
    _check_names(of_router, _OF_ROUTER, "Router")

    report = explain(fn, *args, options=options, dynamic=dynamic, ranks=ranks, **(kwargs or {}))
    problems = []
    if len(report.regions) != layers:
        problems.append(f"expected {_count(layers)}, found {len(report.regions)}")
    for number, region in enumerate(report.regions, start=1):
        where = f"layer {number} ({region.source})"
        problems += [f"{where}: {p}" for p in _differences(region, wanted)]
        problems += [f"{where}: router.{p}" for p in _differences(region.router, of_router)]
    if problems:
        raise AssertionError("\n".join(problems) + f"\n\n{report.to_text()}")
    return report


def assert_declined(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    reason: str | re.Pattern[str],
    source: str = "",
    nearest_form: str | None = None,
    ranks: int | None = None,
    dynamic: bool | None = None,
    options: Mapping[str, Any] | Options | None = None,
) -> Declined:
    """A candidate of ``fn(*args, **kwargs)`` is declined for ``reason``; returns the first.

    reason: a substring, or a compiled pattern to search for. source: a substring of its
    ``file:line``. nearest_form: if given, equal. The other arguments as in `assert_matches`.

    Raises AssertionError, with the report, if none is.
    """
    report = explain(fn, *args, options=options, dynamic=dynamic, ranks=ranks, **(kwargs or {}))
    pattern = re.compile(re.escape(reason)) if isinstance(reason, str) else reason
    for declined in report.declined:
        if (
            pattern.search(declined.reason)
            and source in declined.source
            and nearest_form in (None, declined.nearest_form)
        ):
            return declined
    wanted = {"reason": reason if isinstance(reason, str) else reason.pattern}
    wanted |= {"source": source} if source else {}
    wanted |= {"nearest form": nearest_form} if nearest_form is not None else {}
    described = ", ".join(f"{name} {value!r}" for name, value in wanted.items())
    raise AssertionError(f"no candidate declined with {described}\n\n{report.to_text()}")


def _check_names(given: Mapping[str, Any], known: Sequence[str], of: str) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"{of} has no field {', '.join(unknown)}; it has {', '.join(known)}")


def _differences(found: Region | Router, wanted: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: expected {value!r}, found {getattr(found, name)!r}"
        for name, value in wanted.items()
        if getattr(found, name) != value
    ]


def _count(layers: int) -> str:
    return "1 MoE layer" if layers == 1 else f"{layers} MoE layers"
