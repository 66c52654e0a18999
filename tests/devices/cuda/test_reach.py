"""Which GPUs can write to each other's memory: the same answer on every rank, with the reason. Two
real ranks, whose GPUs are made up."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe_fx.devices.cuda.peers import board
from moe_fx.devices.cuda.peers.reach import unreachable
from moe_fx.testing import RankPool


def asked(rank: int, numbers: tuple[int, int], gpus: list[str], seen: int, access: bool) -> str:
    """numbers: of the ranks' devices. gpus: as every process numbers them, the first ``seen`` of
    which it sees."""
    properties = mock.Mock(side_effect=lambda device: mock.Mock(uuid=uuid(device)))

    def uuid(device: Any) -> str:
        at = device if isinstance(device, int) else device.index
        return gpus[(at + rank) % 2] if numbers[0] == numbers[1] else gpus[at]

    with (
        mock.patch.object(torch.cuda, "get_device_properties", properties),
        mock.patch.object(torch.cuda, "device_count", lambda: seen),
        mock.patch.object(torch.cuda, "can_device_access_peer", lambda *_: access),
    ):
        return unreachable(dist.new_group(), torch.device("cuda", numbers[rank]), 20.0)


@pytest.mark.parametrize(
    ("numbers", "gpus", "seen", "access", "said"),
    [
        ((0, 1), ["a", "b"], 2, True, ""),
        ((0, 1), ["a", "b"], 2, False, "the GPU of rank 0 cannot access that of rank 1"),
        ((0, 0), ["a", "b"], 1, True, "ranks have GPUs of the same number"),
        ((0, 1), ["a", "b"], 1, True, "rank 0 does not see the GPU of rank 1"),
        ((0, 1), ["a", "a"], 2, True, "ranks share a GPU"),
    ],
)
def test_every_rank_says_the_same(
    ranks2: RankPool, numbers: Any, gpus: list[str], seen: int, access: bool, said: str
) -> None:
    first, second = ranks2.run(asked, numbers, gpus, seen, access)
    assert first == second
    assert first.startswith(said) and bool(first) == bool(said)


def without_memory(rank: int) -> Any:
    refusal = OSError(28, os.strerror(28))
    with mock.patch.object(board, "_made", mock.Mock(side_effect=refusal)):
        return board.board_of(dist.new_group(), 20.0)


def test_no_memory_to_share_is_said_on_every_rank(ranks2: RankPool) -> None:
    reason = "rank 0 cannot share memory with others (No space left on device)"
    assert ranks2.run(without_memory) == [reason, reason]
