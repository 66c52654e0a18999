"""Two ranks on NVIDIA GPUs over NCCL: one GPU each, or, on a machine with one, all on that one.

NCCL refuses two ranks of one host on one device. Ranks that share one say by ``NCCL_HOSTID`` that
they are on hosts of their own, and exchange over the loopback interface: what they compute and
exchange, and how a wait ends, is as on two GPUs; how fast, is not.
"""

from __future__ import annotations

import os

import pytest
import torch

_RANKS = 2
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def take_gpu(rank: int) -> torch.device:
    """The current device from now on. Before this process's first exchange."""
    os.environ["MOE_FX_CHUNKS"] = "exact"  # few tokens in many chunks, which do not pay
    count = torch.cuda.device_count()
    if count < _RANKS:
        os.environ |= {"NCCL_HOSTID": f"rank {rank}", "NCCL_SOCKET_IFNAME": "lo"}
    device = torch.device("cuda", rank % count)
    torch.cuda.set_device(device)
    return device
