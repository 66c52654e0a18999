"""The pytest plugin that comes with moe_fx."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

from moe_fx.testing import RankPool

ROOT = Path(__file__).parents[2]


def test_loading_the_plugin_imports_neither_torch_nor_moe_fx() -> None:
    loaded = "import sys, moe_fx_pytest; print(sorted({'torch', 'moe_fx'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", loaded],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert result.stdout.strip() == "[]"


def test_pytest_finds_the_plugin_where_moe_fx_is_installed() -> None:
    """If this fails in a checkout: ``pip install -e .`` once more."""
    plugins = distribution("moe-fx").entry_points.select(group="pytest11")
    assert [(p.name, p.value) for p in plugins] == [("moe_fx_pytest", "moe_fx_pytest")]


def test_pools_are_shared_by_size(
    moe_fx_ranks: Callable[[int], RankPool], ranks2: RankPool, ranks4: RankPool
) -> None:
    assert moe_fx_ranks(2) is ranks2
    assert moe_fx_ranks(4) is ranks4 is not ranks2
    assert ranks4.world_size == 4
