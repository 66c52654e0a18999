"""What the built wheel holds."""

from __future__ import annotations

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import moe_fx

ROOT = Path(moe_fx.__file__).resolve().parents[1]


@pytest.mark.slow  # builds in an environment of its own, which it downloads
def test_the_wheel_is_typed_and_says_what_it_is(tmp_path: Path) -> None:
    build = ("-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT))
    subprocess.run([sys.executable, *build], check=True)
    (wheel,) = tmp_path.glob("moe_fx-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        said = email.message_from_bytes(archive.read(metadata))
    for name in (
        "moe_fx/py.typed",
        "moe_fx/report/templates/report.html",
        "moe_fx_cli/__init__.py",
    ):
        assert name in names
    assert "Typing :: Typed" in said.get_all("Classifier", [])
    assert said.get_all("Project-URL")
