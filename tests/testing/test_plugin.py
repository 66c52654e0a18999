"""The pytest plugin, and the page that shows a downstream project how to use it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest

from moe_fx.testing import RankPool

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"


def test_loading_the_plugin_imports_neither_torch_nor_moe_fx() -> None:
    loaded = "import sys, moe_fx_pytest; print(sorted({'torch', 'moe_fx'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", loaded],
        capture_output=True,
        text=True,
        check=True,
        cwd=PAGE.parents[1],
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


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_the_page_for_downstream_projects_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"\(`(\w+\.py)`\):\n\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == ["my_moe.py", "test_my_moe.py"]
    for name, code in blocks:
        (tmp_path / name).write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_moe.py"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "7 passed" in result.stdout
