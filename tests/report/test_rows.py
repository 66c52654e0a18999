"""The table for people, at every width a terminal may have."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from moe_fx.report.rows import Rows

SOURCES = ("modeling_deepseek_v3.py:152", "a_file_with_a_rather_long_name.py:1234")


def shown(width: int) -> str:
    rows = Rows("Found: 2", ("experts", "router", "remark", "source"))
    rows.add_row("4 of 16, hidden 128", "sigmoid groups 2/4 renorm ×2.5", "", SOURCES[0])
    rows.add_row("8 of 256, hidden 7168", "softmax [experts, hidden] [/]", "", SOURCES[1])
    console = Console(file=io.StringIO(), width=width)
    console.print(rows)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [56, 80, 100, 120, 200])
def test_no_word_is_torn_and_no_line_is_too_long(width: int) -> None:
    text = shown(width)
    for word in (*SOURCES, "256,", "7168", "sigmoid", "[experts,", "[/]", "×2.5"):
        assert word in text.replace("\n", " ").split() or f"│ {word}" in text, word
    assert max(map(len, text.splitlines())) <= width


def test_a_narrow_terminal_gets_a_block_for_each_row() -> None:
    assert [line.split() for line in shown(56).splitlines()[1:4]] == [
        ["1.", "experts", "4", "of", "16,", "hidden", "128"],
        ["router", "sigmoid", "groups", "2/4", "renorm", "×2.5"],
        ["source", SOURCES[0]],
    ]


def test_a_wide_terminal_gets_a_line_for_each_row() -> None:
    (line,) = [line for line in shown(200).splitlines() if SOURCES[1] in line]
    assert "8 of 256, hidden 7168 │ softmax [experts, hidden] [/]" in line


def test_a_column_without_text_is_left_out() -> None:
    assert "remark" not in shown(200)
