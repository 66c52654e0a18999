"""Options that pydantic refuses, in the words of a user: one clause for each option."""

from __future__ import annotations

from collections.abc import Collection

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from moe_fx.suggest import did_you_mean

_SHOULD_BE = "Input should be "
_OWN = "Value error, "


def describe(error: ValidationError, known: Collection[str]) -> str:
    """What is wrong with each option. known: the names of all options."""
    of_place: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors():
        option, *within = detail["loc"]
        place = [str(option), *(str(at) for at in within if isinstance(at, int))]
        of_place.setdefault(".".join(place), []).append(detail)
    return "; ".join(_clause(place, details, known) for place, details in of_place.items())


def _clause(place: str, details: list[ErrorDetails], known: Collection[str]) -> str:
    first = details[0]
    if first["type"] == "extra_forbidden":
        close = did_you_mean(place, known).strip()
        return f"{place}: there is no such option" + f" ({close})" * bool(close)
    # More than one: of a union, whose members each say what they take.
    said = [first["msg"].removeprefix(_OWN)]
    said += [detail["msg"].removeprefix(_SHOULD_BE) for detail in details[1:]]
    return f"{place}: {', or '.join(said)} (given: {first['input']!r})"
