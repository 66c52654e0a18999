"""What was found, what was declined and why: `Report`, as text, JSON (`schema`) and HTML (`html`).

To add a field: `report.py`, then `schema.py` for its JSON form and `templates/report.html`.
"""

from __future__ import annotations

from moe_fx.report.report import Report

__all__ = ["Report"]
