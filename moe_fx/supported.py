"""Which releases of torch and transformers moe_fx has been run on: older ones are refused, newer
ones warned of.

Imports nothing of moe_fx and nothing private of torch: it is checked before those.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from packaging.version import Version

__all__ = ["RAN", "Ran", "check_torch", "check_transformers"]


@dataclass(frozen=True)
class Ran:
    """Tests that passed with one release of torch and one of transformers.

    tests: arguments of pytest, as a shell expands them; "tests" is the whole default suite.
    """

    torch: str
    transformers: str
    tests: str


_SHARDS = (
    "tests/passes/normalise/test_id_bounds.py tests/weights/test_shard.py "
    "--deselect=tests/weights/test_shard.py::test_one_graph_with_one_gather_a_weight"
)
"""transformers 5.17 itself does not compile the deselected one: ``grouped_mm_fallback`` asks for
how many rows an expert has."""

_OLDEST = (
    "tests/ops tests/passes/normalise tests/passes/recognise/test_[a-e]*.py "
    "tests/passes/recognise/test_recognise.py tests/passes/strategies/test_mc2.py "
    "tests/passes/overlap/test_overlap.py tests/test_errors.py tests/entry/test_mode.py "
    "tests/weights tests/ranks tests/e2e/test_checkpointing.py tests/e2e/test_even_exchange.py "
    "tests/e2e/test_programs.py tests/e2e/test_families.py tests/e2e/test_missing_rank.py "
    "tests/e2e/test_tables_on_the_way.py"
)

RAN = (
    Ran("2.11.0", "5.24.0", _OLDEST),
    Ran("2.13.0", "5.17.0", _SHARDS),
    Ran("2.13.0", "5.24.0", "tests"),
    Ran("2.14.1", "5.24.0", "tests"),
)
"""The oldest and the newest of each package are the bounds. `.ci/versions` runs them again."""


def check_torch(version: str) -> None:
    """Raises `ImportError`, saying what to install, for a torch older than any that moe_fx was run
    on; warns of one that is newer."""
    _check("torch", version, [ran.torch for ran in RAN])


def check_transformers(version: str) -> None:
    """As `check_torch`, for the integration with transformers."""
    _check("transformers", version, [ran.transformers for ran in RAN])


def _check(package: str, version: str, ran: list[str]) -> None:
    oldest, newest = min(ran, key=_release), max(ran, key=_release)
    if _release(version) < _release(oldest):
        raise ImportError(
            f"moe_fx needs {package} {_text(oldest)} or newer, but {package} {version} is "
            f"installed. Install a newer one, as in pip install '{package}>={_text(oldest)}'."
        )
    if _release(version) > _release(newest):
        warnings.warn(
            f"moe_fx has not been run on {package} {version}: {_text(newest)} is the newest "
            f"release that it has been tested on. It relies on internals that change between "
            f"releases. If something fails, try a newer moe_fx, or "
            f"pip install '{package}=={_text(newest)}.*'.",
            stacklevel=4,
        )


def _release(version: str) -> tuple[int, ...]:
    """``"2.14.1+cu130"`` to ``(2, 14)``: patch releases are not told apart."""
    return Version(version).release[:2]


def _text(version: str) -> str:
    return ".".join(map(str, _release(version)))
