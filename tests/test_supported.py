"""Releases of torch and transformers: too old is an error, newer than what was run a warning."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from moe_fx.supported import RAN, check_torch, check_transformers

ROOT = Path(__file__).parents[1]
NEWER = [(check_torch, "torch", "2.15.0"), (check_transformers, "transformers", "5.25.0.dev0")]
FINE = [
    *[(check_torch, v) for v in ("2.11.0+cu130", "2.12.1", "2.13.0+cpu", "2.14.1", "2.14.7")],
    *[(check_transformers, v) for v in ("5.17.0", "5.20.2", "5.24.0", "5.24.3")],
]


@pytest.mark.parametrize(
    ("check", "package", "version"),
    [
        (check_torch, "torch", "2.10.1"),
        (check_torch, "torch", "1.13.1"),
        (check_transformers, "transformers", "5.16.1"),
    ],
)
def test_an_older_one_is_refused(check: Callable[[str], None], package: str, version: str) -> None:
    with pytest.raises(ImportError, match=f"{package} {version} is installed.*pip install '"):
        check(version)


@pytest.mark.parametrize(("check", "package", "version"), NEWER)
def test_a_newer_one_is_warned_of(check: Callable[[str], None], package: str, version: str) -> None:
    with pytest.warns(UserWarning, match=f"has not been run on {package} {version}"):
        check(version)


@pytest.mark.parametrize(("check", "version"), FINE)
def test_one_in_between_is_fine(check: Callable[[str], None], version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(version)


def test_the_warning_is_seen_on_import_and_names_the_line_that_imports(tmp_path: Path) -> None:
    script = tmp_path / "of_a_user.py"
    script.write_text("import torch\ntorch.__version__ = '2.99.0'\nimport moe_fx\n")
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=paths)
    assert "of_a_user.py:3: UserWarning: moe_fx has not been run on torch 2.99.0" in done.stderr


@pytest.mark.parametrize(("package", "refused"), [("torch", "2.10.1"), ("transformers", "5.16.1")])
def test_the_package_asks_for_what_it_was_run_on(package: str, refused: str) -> None:
    """From the oldest on, and without an upper bound for torch: a newer one is only warned of. If
    this fails in a checkout: ``pip install -e .`` once more."""
    wanted = map(Requirement, requires("moe-fx") or ())
    [found] = [each for each in wanted if each.name == package and "test" not in str(each.marker)]
    assert all(getattr(ran, package) in found.specifier for ran in RAN)
    assert refused not in found.specifier
    assert ("2.99" in found.specifier) is (package == "torch")


def test_the_page_says_what_was_run() -> None:
    page = (ROOT / "docs" / "limits.md").read_text()
    for ran in RAN:
        tests = "the default suite" if ran.tests == "tests" else f"`{ran.tests}`"
        assert f"| {ran.torch} | {ran.transformers} | {tests}" in page


def test_what_was_run_goes_from_the_oldest_to_the_newest() -> None:
    order = sorted(RAN, key=lambda ran: [Version(ran.torch), Version(ran.transformers)])
    assert list(RAN) == order
