"""moe_fx's version: one place, which needs nothing else to be imported."""

__version__ = "0.1.0"
