"""What counts as equal when two results are compared, and which results tell anything."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

SEEN = 3.0
"""A change of the result counts as seen if it is so many times what counts as equal."""
_SMALL = 1e-3
"""A gradient this much smaller than the largest may be all rounding."""
_LOOKED_AT = 1 << 16


def tells(result: Tensor) -> bool:
    """Whether an equal result could not be one by chance: finite, with more than two values (it is
    not zero, the same everywhere, or clamped)."""
    if not bool(result.isfinite().all()):
        return False
    least = min(3, result.numel())
    return bool(result.any()) and len(result.flatten()[:_LOOKED_AT].unique()) >= least


def not_finite(gradients: Sequence[Tensor]) -> int | None:
    """The position of the first that shows nothing, since it has entries that are not finite."""
    return next((at for at, g in enumerate(gradients) if not bool(g.isfinite().all())), None)


def relative_errors(expected: Sequence[Tensor], found: Sequence[Tensor]) -> list[float]:
    """The largest difference of each gradient, relative to its largest entry, or to a fraction of
    the largest of all where that is more."""
    sizes = [_largest(gradient) for gradient in expected]
    floor = max(_SMALL * max(sizes, default=0.0), 1e-30)
    errors = []
    for left, right, size in zip(expected, found, sizes, strict=True):
        error = _largest(left.double() - right.double()) / max(size, floor)
        errors.append(error if error == error else float("inf"))
    return errors


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().amax()) if tensor.numel() else 0.0
