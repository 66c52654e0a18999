"""The page that follows one layer through the stages says what a run says."""

from __future__ import annotations

from tests.one_layer import PAGE, page


def test_the_page_is_what_a_run_gives() -> None:
    assert PAGE.read_text() == page(), "python -m tests.one_layer writes it anew"
