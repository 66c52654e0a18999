"""Counts and sizes for callers who may be given anything: every rank learns what is wrong on any.

A rank that raised on its own would leave the others waiting for it. So each sends, with its counts,
a *status*; whoever reads the sizes reads all of them, and raises if one is bad. The check costs no
exchange and no host sync of its own.

Shapes: ``W`` ranks, ``E`` experts, ``L = E / W`` local ones, ``C`` expert slices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_fx.compat import resolve_group
from moe_fx.errors import BadInput
from moe_fx.ops._define import define
from moe_fx.ranks.agree import ensure_same
from moe_fx.ranks.waiting import TIMEOUT, WAITING, of, start_and_wait

FINE, OUT_OF_RANGE, REFUSED = range(3)
"""Codes: all is well; an id is no expert's (detail: the id); the rank has raised an error of its
own already."""
STATUS_LENGTH = 5
"""``[code, detail, hidden size, dtype, experts]``; the dtype by its place in `DTYPES`."""
ROOM = 256
"""Counts travel in messages for a multiple of so many experts, so that ranks which count different
numbers of experts exchange messages all the same, and can be told."""
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _dispatch_counts(
    ids: Tensor, num_experts: int, width: int, dtype: int
) -> tuple[Tensor, Tensor]:
    """``counts [E], status [5]``, without a host sync where ids are on a device."""
    flat = ids.reshape(-1).long()
    bad = (flat < 0) | (flat >= num_experts)
    bad_ids = torch.where(bad, flat, 0)
    bad_ids = torch.cat([bad_ids, bad_ids.new_zeros(1)])  # a rank may have none
    least, most = bad_ids.aminmax()
    worst = torch.where(most > 0, most, least)
    facts = [bad_ids.new_full((), number) for number in (width, dtype, num_experts)]
    status = torch.stack([bad.any().long() * OUT_OF_RANGE, worst, *facts])
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat.clamp(0, num_experts - 1), (~bad).long()), status


def _dispatch_counts_fake(
    ids: Tensor, num_experts: int, width: int, dtype: int
) -> tuple[Tensor, Tensor]:
    counts = ids.new_empty((num_experts,), dtype=torch.int64)
    return counts, ids.new_empty((STATUS_LENGTH,), dtype=torch.int64)


def refused(num_experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What ``dispatch_counts`` gives for input that the rank has raised an error about."""
    status = torch.tensor([REFUSED, 0, 0, 0, num_experts], dtype=torch.int64, device=device)
    return torch.zeros(num_experts, dtype=torch.int64, device=device), status


def _gather_counts(
    counts: Tensor,
    status: Tensor,
    group: str,
    timeout: float,
    *,
    layer: str = "",
    exchange_timeout: float = TIMEOUT,
) -> Tensor:
    """``counts [E], status [5] -> [W, E + 5]``, of every rank. Before the group's first message of
    a size, waits ``timeout`` seconds for all ranks to come to theirs."""
    experts = counts.numel()
    room = -(-experts // ROOM) * ROOM
    ensure_same(group, f"messages for {room} experts", timeout)
    process_group = resolve_group(group)
    message = torch.cat([status, counts, counts.new_zeros(room - experts)])
    copies = message.repeat(process_group.size(), 1)
    received = torch.empty_like(copies)
    start_and_wait(
        lambda async_op: dist.all_to_all_single(
            received, copies, group=process_group, async_op=async_op
        ),
        process_group,
        counts.device,
        f"counts of {of(layer)}",
        exchange_timeout,
    )
    statuses, theirs = received[:, :STATUS_LENGTH], received[:, STATUS_LENGTH:]
    return torch.cat([theirs[:, :experts], statuses], 1)


def _gather_counts_fake(
    counts: Tensor, status: Tensor, group: str, timeout: float, **waiting: Any
) -> Tensor:
    return counts.new_empty((resolve_group(group).size(), counts.shape[0] + STATUS_LENGTH))


def _checked_sizes(gathered: Tensor, num_experts: int, rank: int, chunks: int = 1) -> Tensor:
    """``[C, 2, W]`` on the host, as of ``split_sizes``, chunks by expert. The one op that waits for
    the device. Raises `BadInput` if any rank's status says so."""
    host = gathered.cpu()
    require_fine(host[:, num_experts:].tolist(), num_experts, rank)
    world = host.shape[0]
    counts = host[:, :num_experts].view(world, world, chunks, -1).sum(-1)  # source, owner, chunk
    return torch.stack([counts[rank].t(), counts[:, rank].t()], 1)


def _checked_sizes_fake(gathered: Tensor, num_experts: int, rank: int, chunks: int = 1) -> Tensor:
    return torch.empty((chunks, 2, gathered.shape[0]), dtype=torch.int64, device="cpu")


def require_fine(statuses: list[list[int]], num_experts: int, rank: int) -> None:
    """statuses: of every rank. Raises `BadInput`, the same on all of them."""
    bad = []
    for at, (code, detail, *_) in enumerate(statuses):
        if code == OUT_OF_RANGE:
            bad.append(f"rank {at}: an expert id is {detail}, expected 0 to {num_experts - 1}")
        elif code != FINE:
            bad.append(f"rank {at} raised an error of its own, see there")
    if bad:
        raise BadInput(
            f"The dispatcher was given bad input, and no rank exchanged any rows. {'; '.join(bad)}."
        )
    own = statuses[rank][2:]
    for at, (_, _, *other) in enumerate(statuses):
        if other != own:
            raise BadInput(
                f"Ranks dispatch rows that do not fit together: rank {rank} has {_rows(*own)}, "
                f"rank {at} has {_rows(*other)}."
            )


def _rows(width: int, dtype: int, experts: int) -> str:
    return f"{width} features of {DTYPES[dtype]} for {experts} experts"


define(
    "dispatch_counts(Tensor ids, int num_experts, SymInt width, int dtype) -> "
    "(Tensor counts, Tensor status)",
    _dispatch_counts,
    _dispatch_counts_fake,
)
define(
    f"gather_counts(Tensor counts, Tensor status, str group, float timeout, {WAITING}) -> Tensor",
    _gather_counts,
    _gather_counts_fake,
)
define(
    "checked_sizes(Tensor gathered, int num_experts, int rank, int chunks=1) -> Tensor",
    _checked_sizes,
    _checked_sizes_fake,
)
