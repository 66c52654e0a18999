"""Layers whose program exchanges tokens itself: recognised, and taken back to one device.

`Exchanged` finds them; `Unexchange` puts an equal graph without exchange in their place, which
`Recognise` then reads. Rejects (declined): a program whose stand-in is not proved equal.
"""

from __future__ import annotations

from moe_fx.passes.recognise.exchanged.exchanged import Exchanged
from moe_fx.passes.recognise.exchanged.unexchange import Unexchange

__all__ = ["Exchanged", "Unexchange"]
