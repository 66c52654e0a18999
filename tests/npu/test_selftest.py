"""The script for people with an NPU, as far as it goes without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_on_cpu_every_check_passes(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "moe_fx.npu_selftest", "--device", "cpu"]
    command += ["--bases", "aot_eager", "--report", str(report)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    written = json.loads(report.read_text())
    assert {"torch", "torch_npu", "ranks"} <= set(written["environment"])
    assert len(written["checks"]) > 15
    assert all(check["passed"] for check in written["checks"])
    assert "attach it" in ran.stdout


def test_a_device_that_computes_nothing_fails_it(tmp_path: Path) -> None:
    """The fake device: every comparison must fail, and be reported, not raise."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "moe_fx.npu_selftest", "--bases", "", "--report", str(report)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1, ran.stderr[-3000:]
    checks = json.loads(report.read_text())["checks"]
    ops = [check for check in checks if check["name"].startswith("npu::")]
    assert len(ops) == 16 and not any(check["passed"] for check in ops)
