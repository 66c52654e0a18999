"""Which torch releases moe_fx works with. Checked before anything private of torch is imported."""

from __future__ import annotations

_OLDEST, _FIRST_UNSUPPORTED = (2, 11), (2, 14)


def require_supported_torch(version: str) -> None:
    """Raise ImportError, saying what to install, unless ``version`` is a supported release."""
    major, minor = version.split(".")[:2]
    if not _OLDEST <= (int(major), int(minor)) < _FIRST_UNSUPPORTED:
        raise ImportError(
            f"moe_fx needs torch >= 2.11 and < 2.14, but torch {version} is installed. It relies "
            "on torch.compile internals that change between releases: install a supported one, "
            "as in pip install 'torch==2.13.*', or a newer moe_fx."
        )
