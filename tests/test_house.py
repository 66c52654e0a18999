"""The house: who may import whom, how large a folder may grow, and that a wheel holds all of it.

Every import is read, eager and lazy. A module may import what stands on its own floor or below;
two folders never import each other in a circle, nor do two modules.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.house import (
    MOST_MODULES,
    ROOT,
    arrows_up,
    between_folders,
    circle,
    floor_of,
    full_folders,
    imports,
    modules,
)
from tests.house_picture import PICTURE, picture

MOST_LINES = 430
LONG = {"moe_fx/compat.py"}  # every private import of torch stands in it

FILES = modules(ROOT)


def test_no_module_imports_itself_in_a_circle() -> None:
    assert circle(imports(FILES)) == []


def test_no_import_runs_up() -> None:
    assert arrows_up(imports(FILES)) == []


def test_folders_do_not_import_each_other_in_a_circle() -> None:
    assert circle(between_folders(imports(FILES))) == []


def test_every_module_stands_on_a_floor_of_its_own() -> None:
    """A new folder says where it stands; only the package itself is on the floor of `moe_fx`."""
    nowhere = [name for name in FILES if name != "moe_fx" and floor_of(name) == floor_of("moe_fx")]
    assert nowhere == []


def test_no_folder_is_full() -> None:
    assert full_folders(FILES) == []


def test_no_file_is_long() -> None:
    long = {
        name
        for name in (str(file.relative_to(ROOT)) for file in FILES.values())
        if len((ROOT / name).read_text().splitlines()) > MOST_LINES
    }
    assert long <= LONG


def test_every_stage_says_what_it_is_for() -> None:
    silent = [
        str(file.parent.relative_to(ROOT))
        for file in FILES.values()
        if not (file.parent / "__init__.py").exists()
        or not ast.get_docstring(ast.parse((file.parent / "__init__.py").read_text()))
    ]
    assert sorted(set(silent)) == []


def test_a_wheel_holds_every_package() -> None:
    listed = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert listed is not None
    renamed = {"moe_fx.pytest_plugin": "moe_fx_pytest", "moe_fx.command_line": "moe_fx_cli"}
    there = {renamed.get(n, n) for n, file in FILES.items() if file.name == "__init__.py"}
    assert set(re.findall(r'"(.*?)"', listed[1])) == there


@pytest.mark.parametrize(
    ("module", "text", "said"),
    [
        ("moe_fx.graph.flow", "def f():\n    from moe_fx.passes.base import Pass\n", "above"),
        ("moe_fx.plan", "import moe_fx.compat\nimport moe_fx.options\n", "above"),
    ],
)
def test_a_planted_import_that_runs_up_is_found(
    module: str, text: str, said: str, tmp_path: Path
) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(text)
    edges = imports({**FILES, module: planted})
    assert [found for found in arrows_up(edges) if said in found and module in found]


def test_a_planted_circle_and_a_fifteenth_module_are_found(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("from moe_fx.options import Options\n")
    assert "moe_fx.options" in circle(imports({**FILES, "moe_fx.compat": planted}))
    crowd = {f"moe_fx.new.m{at}": tmp_path / f"m{at}.py" for at in range(MOST_MODULES + 1)}
    assert full_folders(crowd) == [f"{tmp_path} holds {MOST_MODULES + 1} modules"]


def test_the_picture_is_of_this_tree() -> None:
    assert PICTURE.read_text() == picture(), "python -m tests.house_picture draws it anew"


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by it: of two, one run could take only one."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []
