"""What cannot be used: one message on standard error, exit status 2 and no traceback."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

__all__ = ["fail", "failing", "writable", "write"]


def writable(path: Path | None) -> Path | None:
    """For an option: what cannot be written is known before the work, not after it."""
    if path is not None:
        if not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no folder {str(path.absolute().parent)!r}")
        if path.is_dir():
            raise typer.BadParameter(f"{str(path)!r} is a folder, expected a file")
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise typer.BadParameter(f"{str(path)!r} cannot be written")
    return path


def write(path: Path, how: Callable[[Path], object]) -> None:
    try:
        how(path)
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}")


@contextmanager
def failing() -> Iterator[None]:
    """An error that moe_fx raises on purpose, or a torch that it does not work with, ends the
    command with one message."""
    try:
        from moe_fx.errors import MoeFxError
    except ImportError as error:
        fail(f"moe_fx cannot be imported: {error}")
    try:
        yield
    except MoeFxError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    said = Text.assemble(("error: ", "red"), message)
    console = Console(stderr=True)
    console.print(said, soft_wrap=not console.is_terminal)
    raise typer.Exit(2)
