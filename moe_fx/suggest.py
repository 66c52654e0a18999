"""What a misspelt name was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"Did you mean verify? "``, or "" if nothing in ``known`` is close to ``name``."""
    close = difflib.get_close_matches(name, list(known))
    return f"Did you mean {' or '.join(close)}? " if close else ""
