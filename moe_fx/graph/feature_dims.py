"""Which argument of an op names the dims it works along, and what a reshape does to features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

aten = torch.ops.aten

DIM_OF: dict[Any, tuple[int, str, Any]] = {
    aten.split.Tensor: (2, "dim", 0),
    aten.split_with_sizes.default: (2, "dim", 0),
    aten.chunk.default: (2, "dim", 0),
    aten.unbind.int: (1, "dim", 0),
    aten.slice.Tensor: (1, "dim", 0),
    aten.select.int: (1, "dim", 0),
    aten.narrow.default: (1, "dim", 0),
    aten.flip.default: (1, "dims", None),
    aten.softmax.int: (1, "dim", None),
    aten._softmax.default: (1, "dim", None),
    aten.sum.dim_IntList: (1, "dim", None),
    aten.mean.dim: (1, "dim", None),
    aten.amax.default: (1, "dim", None),
    aten.cumsum.default: (1, "dim", None),
    aten.glu.default: (1, "dim", -1),
}
"""op -> position, name and default of the argument that names its dims."""
KEEPS_DIMS = frozenset(DIM_OF) - {
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
}
TRAILING: dict[Any, int] = {aten.layer_norm.default: 1, aten.rms_norm.default: 1}
"""Ops along the last dims -> position of those dims' sizes."""


def regrouped(
    before: Sequence[int], features: Sequence[bool], after: Sequence[int]
) -> tuple[bool, ...] | None:
    """Which dims of a reshape's result are features; None if it mixes features with other dims.

    Dims of both sides are taken in groups of equal product; a dim of 1 is no feature.
    """
    result: list[bool] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = 1, 1
        kinds: set[bool] = set()
        start = j
        while True:
            if left == right and (left > 1 or (i == len(before) and j == len(after))):
                break
            if left <= right and i < len(before):
                if before[i] != 1:
                    kinds.add(features[i])
                left *= before[i]
                i += 1
            elif j < len(after):
                right *= after[j]
                j += 1
            else:
                break
        if left != right or len(kinds) > 1:
            return None
        result += [True in kinds and size != 1 for size in after[start:j]]
    return tuple(result)
