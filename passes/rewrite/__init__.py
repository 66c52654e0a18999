"""Rewrite: regions become ops of the dialect.

Contract. In: verified regions and their plans. Out: a graph of ATen and dialect ops, in which each
exchange that is started is waited for once. `FuseRouter` makes one op of a router where the device
has it.
"""

from __future__ import annotations

from moe_fx.passes.rewrite.fuse_router import FuseRouter
from moe_fx.passes.rewrite.rewrite import Rewrite

__all__ = ["FuseRouter", "Rewrite"]
