"""The command line, for programs that import it from here: the package moe_fx_cli."""

from __future__ import annotations

from moe_fx_cli import app

__all__ = ["app"]
