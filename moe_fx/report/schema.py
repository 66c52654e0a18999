"""The JSON schema of a report, made from the dataclasses that a report consists of."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, Field, create_model

from moe_fx.plan import ExchangePlan
from moe_fx.region import Break, Declined, Effect, Lowered, Region, Router, Verification

VERSION = 1
"""Grows when a field is taken away or changes its meaning; not when one is added."""
_OF_THE_GRAPH = ("parts", "listing")


def names(cls: type) -> list[str]:
    """The fields of a dataclass that go into JSON."""
    return [f.name for f in fields(cls) if f.name not in _OF_THE_GRAPH]


def json_schema(description: str) -> dict[str, Any]:
    """``description``: of the whole report."""
    schema = _report().model_json_schema(mode="serialization")
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return head | schema | {"description": description}


@cache
def _report() -> type[BaseModel]:
    router, verification = _model(Router), _model(Verification)
    effects: Any = list[_model(Effect)]  # type: ignore[misc]
    region = _model(Region, router=router, verification=verification | None, effects=effects)
    plan = _model(ExchangePlan, host_sync=str)
    types: dict[str, Any] = {
        "version": Literal[1],
        "model": str,
        "versions": dict[str, str],
        "graphs": int,
        "regions": list[region],  # type: ignore[valid-type]
        "declined": list[_model(Declined)],  # type: ignore[misc]
        "plans": list[plan],  # type: ignore[valid-type]
        "pass_seconds": dict[str, float],
        "lowered": list[_model(Lowered)],  # type: ignore[misc]
        "notes": list[str],
        "breaks": list[_model(Break)],  # type: ignore[misc]
        "expert_parameters": list[str],
    }
    return _of_types("Report", types)


def _model(cls: type, **types: Any) -> type[BaseModel]:
    """A dataclass as JSON has it; ``types`` adds fields or replaces theirs."""
    hints = get_type_hints(cls)
    return _of_types(cls.__name__, {name: hints[name] for name in names(cls)} | types, cls.__doc__)


def _of_types(name: str, types: dict[str, Any], doc: str | None = None) -> type[BaseModel]:
    required: dict[str, Any] = {field: (of, Field()) for field, of in types.items()}
    model: type[BaseModel] = create_model(name, __doc__=doc, **required)
    return model
