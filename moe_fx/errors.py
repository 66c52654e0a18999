"""The errors moe_fx raises on purpose: each says what was expected and what to do about it."""

from __future__ import annotations

__all__ = [
    "BadInput",
    "ConfigurationError",
    "DeclinedLayerWarning",
    "MoeFxError",
    "NothingMatched",
    "RankMissing",
    "RanksDiffer",
]


class MoeFxError(RuntimeError):
    """Base of every error moe_fx raises on purpose."""


class ConfigurationError(MoeFxError, ValueError):
    """The model, the process group or an option cannot be used as given."""


class BadInput(MoeFxError, ValueError):
    """Tensors given to a dispatcher, on this rank or another, cannot be dispatched."""


class NothingMatched(MoeFxError):
    """``strict``: a candidate was not rewritten, or there was none."""


class RanksDiffer(MoeFxError):
    """The ranks of a group compiled different plans, which would hang."""


class DeclinedLayerWarning(UserWarning):
    """A layer runs as it is, although its experts were to be spread over ranks."""


class RankMissing(MoeFxError):
    """An exchange waits for a rank of the group that does not come: it has stopped, failed or gone
    elsewhere."""
