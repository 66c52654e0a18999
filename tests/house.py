"""The house, read from its files: the floors that modules stand on, and who imports whom."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_MODULES = 14

FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "moe_fx.blocks",
        "moe_fx.compat",
        "moe_fx.device",
        "moe_fx.errors",
        "moe_fx.plan",
        "moe_fx.region",
        "moe_fx.sources",
        "moe_fx.suggest",
        "moe_fx.supported",
        "moe_fx.version",
        "moe_fx.wrong_options",
    ),
    ("moe_fx.options", "moe_fx.graph", "moe_fx.ranks", "moe_fx.report"),
    ("moe_fx.ops", "moe_fx.weights"),
    ("moe_fx.cost", "moe_fx.capture", "moe_fx.dispatcher"),
    ("moe_fx.passes.roles", "moe_fx.passes.base", "moe_fx.passes.evaluate"),
    ("moe_fx.passes.normalise",),
    ("moe_fx.passes.recognise", "moe_fx.passes.strategies", "moe_fx.passes.overlap"),
    ("moe_fx.passes.plan", "moe_fx.passes.rewrite", "moe_fx.passes.lower"),
    ("moe_fx.passes.verify",),
    ("moe_fx.passes",),
    ("moe_fx.bases",),
    ("moe_fx.devices",),
    ("moe_fx.entry",),
    ("moe_fx.integrations", "moe_fx.testing"),
    ("moe_fx",),
    ("moe_fx.cli", "moe_fx.pytest_plugin"),
    ("moe_fx.bench",),
    ("moe_fx.command_line",),
    ("moe_fx.npu_selftest",),
)
"""From the ground up. A module belongs to the longest name that it begins with."""


def modules(root: Path) -> dict[str, Path]:
    """``passes/`` is imported as ``moe_fx.passes``."""
    found = {}
    for folder, name in ((root / "moe_fx", "moe_fx"), (root / "passes", "moe_fx.passes")):
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((name, *(part for part in parts if part != "__init__")))] = file
    return found


def imports(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """module -> the modules of moe_fx that it imports, wherever in the file. A folder that a module
    stands in is no import of it."""
    edges: dict[str, set[str]] = {}
    for module, file in files.items():
        edges[module] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{file}:{node.lineno}: a relative import"
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in files else node.module for name in whole]
            else:
                continue
            edges[module] |= {
                name for name in names if name in files and not f"{module}.".startswith(f"{name}.")
            }
    return edges


def floor_of(module: str) -> int:
    floors = {name: level for level, names in enumerate(FLOORS) for name in names}
    standing = [name for name in floors if f"{module}.".startswith(f"{name}.")]
    return floors[max(standing, key=len)]


def circle(edges: Mapping[str, Iterable[str]]) -> list[str]:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def arrows_up(edges: Mapping[str, Iterable[str]]) -> list[str]:
    return sorted(
        f"{module} imports {other}, which stands above it"
        for module, others in edges.items()
        for other in others
        if floor_of(other) > floor_of(module)
    )


def between_folders(edges: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """The imports of modules from outside their folder, as folder -> folders; a folder and one
    inside it are of one piece."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, others in edges.items():
        for other in others:
            here, there = (name.rpartition(".")[0] for name in (module, other))
            apart = not (f"{here}.".startswith(f"{there}.") or f"{there}.".startswith(f"{here}."))
            if apart:
                found[here].add(there)
    return found


def full_folders(files: Mapping[str, Path]) -> list[str]:
    held: dict[Path, int] = defaultdict(int)
    for file in files.values():
        held[file.parent] += file.name != "__init__.py"
    return [f"{folder} holds {n} modules" for folder, n in held.items() if n > MOST_MODULES]
