"""What a compilation says: a line on the terminal or in the log, and artefacts in torch's trace."""

from __future__ import annotations

import io
import json
import logging
import re
from contextlib import redirect_stderr
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import register_backend
from torch.fx import GraphModule

import moe_fx
from tests.testing.layers import Layer, LowestScores, tokens


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(text: str) -> list[str]:
    """What stays on a terminal: without what is erased from the beginning of its line."""
    left = [re.sub(r".*\r\x1b\[2K", "", line) for line in text.split("\n")]
    return [line for line in left if line]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    torch._dynamo.reset()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def compile_and_run(model: nn.Module, x: Tensor, terminal: Terminal, **options: Any) -> None:
    with redirect_stderr(terminal):
        torch.compile(model, backend="moe_fx", options={"base": "eager"} | options)(x)


def test_a_terminal_gets_a_line_for_each_graph(terminal: Terminal) -> None:
    compile_and_run(Layer(), tokens(12, 32), terminal)
    compile_and_run(LowestScores(), tokens(12, 32), terminal)
    compile_and_run(nn.Linear(4, 4), tokens(12, 4), terminal)
    found = r"moe_fx \[\d+/\d+\]: {}; \d+\.\d s, \d+\.\d s of it in eager"
    ways = ("1 MoE layer, on one rank", "no MoE layer, 1 declined", "no MoE layer")
    seen = lines(terminal.getvalue())
    assert len(seen) == len(ways)
    for line, way in zip(seen, ways, strict=True):
        assert re.fullmatch(found.format(way), line), line


def test_it_says_what_it_is_doing_while_the_base_compiler_works(terminal: Terminal) -> None:
    shown: list[str] = []

    @register_backend(name="looks_at_the_terminal")
    def looks(module: GraphModule, inputs: list[Any]) -> Any:
        shown.append(terminal.getvalue())
        return module.forward

    compile_and_run(Layer(), tokens(12, 32), terminal, base="looks_at_the_terminal")
    now = lines(shown[0])[-1]
    assert re.fullmatch(r"moe_fx \[\d+/0\]: 1 MoE layer, on one rank; looks_at_the_te.*…", now)
    assert len(now) <= 80


def test_the_option_switches_it_off(terminal: Terminal, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "moe_fx"):
        compile_and_run(Layer(), tokens(12, 32), terminal, progress=False)
    assert terminal.getvalue() == ""
    assert any("1 MoE layer, on one rank; " in record.message for record in caplog.records)


def test_without_a_terminal_the_log_has_it(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    with caplog.at_level(logging.INFO, "moe_fx"):
        compile_and_run(Layer(), tokens(12, 32), terminal)
    assert terminal.getvalue() == ""
    assert any("1 MoE layer, on one rank; " in record.message for record in caplog.records)


def test_only_the_first_rank_of_a_launch_says_it(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    compile_and_run(Layer(), tokens(12, 32), terminal)
    assert terminal.getvalue() == ""


def test_a_base_compiler_that_fails_leaves_no_half_a_line(terminal: Terminal) -> None:
    @register_backend(name="fails_always")
    def fails(module: GraphModule, inputs: list[Any]) -> Any:
        raise ZeroDivisionError

    with pytest.raises(Exception, match="ZeroDivisionError"):
        compile_and_run(nn.Linear(4, 4), tokens(12, 4), terminal, base="fails_always")
    (line,) = lines(terminal.getvalue())
    assert re.search(r"no MoE layer; \d+\.\d s", line)


class Artefacts(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        about = getattr(record, "metadata", {}).get("artifact", {})
        if about.get("name", "").startswith("moe_fx"):
            self.found.append((about["name"], getattr(record, "payload", "")))


def test_torchs_trace_gets_the_report_and_the_graphs(terminal: Terminal) -> None:
    trace, handler = logging.getLogger("torch.__trace"), Artefacts()
    trace.addHandler(handler)
    try:
        compile_and_run(Layer(), tokens(12, 32), terminal)
    finally:
        trace.removeHandler(handler)
    before, after, report = handler.found
    assert (before[0], after[0]) == ("moe_fx_graph_before", "moe_fx_graph_after")
    assert "aten.bmm" in before[1] and "moe_fx" not in before[1]
    assert "torch.ops.moe_fx.permute" in after[1]
    assert json.loads(report[1])["regions"][0]["num_experts"] == 8
    assert report[0] == "moe_fx_report"


def test_reports_of_explain_need_no_line(terminal: Terminal) -> None:
    with redirect_stderr(terminal):
        moe_fx.explain(Layer(), tokens(12, 32))
    assert terminal.getvalue() == ""
