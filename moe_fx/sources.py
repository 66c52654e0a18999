"""A digest of moe_fx's own sources, for compile caches: an edit of a pass is another pass."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

__all__ = ["SOURCES", "digest_of_sources"]


def digest_of_sources(folders: Iterable[Path]) -> str:
    """SHA-256 of the Python files below ``folders``, whichever place they are installed in."""
    digest = hashlib.sha256()
    seen: set[Path] = set()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            if file.resolve() not in seen:
                seen.add(file.resolve())
                digest.update(f"{folder.name}/{file.relative_to(folder).as_posix()}\n".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _folder(package: str) -> Path:
    """Where ``package`` is, found without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


# `moe_fx.passes` first: a wheel has it inside `moe_fx`, an editable installation has not.
SOURCES = digest_of_sources(_folder(name) for name in ("moe_fx.passes", "moe_fx"))
