"""The exchange: rows travel to the ranks that own their experts, and back.

``all_to_all`` *starts* the exchange and returns a handle; ``wait`` ends it and returns the received
rows. Two invariants hold by construction, under any compiler:

1. *The sent buffer is not reused before the wait*: ``wait`` takes the sent rows as an argument, so
   they are alive until it has run. (Both ops take any layout: to ops that fix it, Inductor would
   give each its own copy of rows it has not stored yet, and the sent copy would be free at once.
   ``wait`` checks that it was given the buffer that is being sent.)
2. *The received buffer is not read before the wait*: it is not in the graph before; ``wait`` is the
   op that returns it, so no view, fusion or early read of it can exist.

The second is why the op returns a handle and not the pending tensor itself, as torch's functional
collectives do: Inductor protects a pending buffer only for ``_c10d_functional`` ops. Gradients flow
through ``wait`` (from received rows to sent rows: the same exchange in reverse).

Shapes: ``W`` ranks, ``L = E / W`` local experts, ``S`` rows sent, ``R`` rows received, ``C`` chunks
(`moe_fx.ops.chunks`; 1: all rows travel at once).
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx.node import has_side_effect

from moe_fx.compat import data_dependent_size, resolve_group
from moe_fx.ops._define import define
from moe_fx.ranks.agree import ensure
from moe_fx.ranks.waiting import TIMEOUT, WAITING, Exchange, of, start, start_and_wait

NOBODY = -1
"""Sizes of rows that no rank of the group sends or receives: nothing is exchanged."""


@dataclass(frozen=True)
class _Pending:
    """An exchange under way; holding the buffers here keeps both from being freed.
    ``given``: address of the rows that ``all_to_all`` got. ``work``: None if nothing travels."""

    received: Tensor
    sent: Tensor
    given: int
    work: Exchange | None


_handles = itertools.count()
_pending: dict[int, _Pending] = {}
_bytes_sent: Counter[str] = Counter()


def bytes_sent(group_name: str) -> int:
    """Bytes of rows this process has sent to *other* ranks of the group so far."""
    return _bytes_sent[group_name]


def count_bytes(group_name: str, sent: int) -> None:
    """Note that many bytes were sent to other ranks."""
    _bytes_sent[group_name] += sent


def pending_exchanges() -> int:
    """Exchanges started and not yet waited for (0 between steps, unless a step was cut short)."""
    return len(_pending)


def _exchange_counts(
    counts: Tensor,
    group: str,
    plans: str | None = None,
    timeout: float = 0.0,
    chunks: int = 1,
    *,
    layer: str = "",
    exchange_timeout: float = TIMEOUT,
) -> Tensor:
    """``counts [C * W * P]``, of each chunk, rank and expert of a slice, to what this rank gets:
    ``[W, C * P]``, of each source, chunk and own expert of a slice.

    ``plans``: what every rank of the group must have planned (`moe_fx.ranks.agree.describe`),
    checked before the group's first exchange with these plans, waiting ``timeout`` seconds for
    others.
    ``layer``, ``exchange_timeout``: who waits, in an error, and how long (`moe_fx.ranks.waiting`).
    """
    if plans is not None:
        ensure(group, plans, timeout)
    process_group = resolve_group(group)
    world = process_group.size()
    by_rank = counts.view(chunks, world, -1).transpose(0, 1).contiguous()
    received = torch.empty_like(by_rank)
    start_and_wait(
        lambda async_op: dist.all_to_all_single(
            received, by_rank, group=process_group, async_op=async_op
        ),
        process_group,
        counts.device,
        f"counts of {of(layer)}",
        exchange_timeout,
    )
    return received.view(world, -1)


def _exchange_counts_fake(
    counts: Tensor,
    group: str,
    plans: str | None = None,
    timeout: float = 0.0,
    chunks: int = 1,
    **waiting: Any,
) -> Tensor:
    return counts.new_empty(counts.shape).view(resolve_group(group).size(), -1)


def _split_sizes(counts: Tensor, recv_counts: Tensor, chunks: int = 1) -> Tensor:
    """``[C, 2, W]`` on the host: rows of each chunk sent to, and received from, each rank. The one
    op that waits for the device."""
    world = recv_counts.shape[0]
    sent = counts.view(chunks, world, -1).sum(-1)
    received = recv_counts.view(world, chunks, -1).sum(-1).t()
    return torch.stack([sent, received], 1).cpu()


def _split_sizes_fake(counts: Tensor, recv_counts: Tensor, chunks: int = 1) -> Tensor:
    return torch.empty((chunks, 2, recv_counts.shape[0]), dtype=torch.int64, device="cpu")


def _all_to_all(
    rows: Tensor,
    send_counts: Tensor,
    recv_counts: Tensor,
    group: str,
    *,
    layer: str = "",
    exchange_timeout: float = TIMEOUT,
) -> Tensor:
    process_group = resolve_group(group)
    send, recv = send_counts.tolist(), recv_counts.tolist()
    given = rows.data_ptr()
    if NOBODY in recv and not rows.shape[0]:
        return _started(_Pending(torch.empty_like(rows), rows, given, None))
    rows = rows.contiguous()
    if sum(send) != rows.shape[0]:
        raise RuntimeError(
            f"moe_fx::all_to_all: the send counts {send} add up to {sum(send)} rows, "
            f"but {rows.shape[0]} rows are given"
        )
    received = rows.new_empty((sum(recv), *rows.shape[1:]))
    work = _start_rows(received, rows, recv, send, process_group, layer, exchange_timeout)
    own = send[process_group.rank()]
    count_bytes(group, (rows.shape[0] - own) * rows[0:1].numel() * rows.element_size())
    return _started(_Pending(received, rows, given, work))


def _start_rows(
    received: Tensor,
    rows: Tensor,
    recv: list[int],
    send: list[int],
    group: dist.ProcessGroup,
    layer: str,
    timeout: float,
) -> Exchange:
    return start(
        lambda: dist.all_to_all_single(received, rows, recv, send, group=group, async_op=True),
        group,
        rows.device,
        f"rows of {of(layer)}",
        timeout,
    )


def _started(pending: _Pending) -> Tensor:
    handle = next(_handles)
    _pending[handle] = pending
    return torch.tensor([handle], dtype=torch.int64)


def _all_to_all_fake(
    rows: Tensor, send_counts: Tensor, recv_counts: Tensor, group: str, **waiting: Any
) -> Tensor:
    return torch.empty((1,), dtype=torch.int64, device="cpu")


def _exchange(
    rows: Tensor,
    send_counts: Tensor,
    recv_counts: Tensor,
    group: str,
    *,
    layer: str = "",
    exchange_timeout: float = TIMEOUT,
) -> Tensor:
    """``all_to_all`` and its ``wait`` in one, on the stream that is current: for compilers that put
    a whole exchange on a stream of its own."""
    send, recv = send_counts.tolist(), recv_counts.tolist()
    process_group = resolve_group(group)
    received = rows.new_empty((sum(recv), *rows.shape[1:]))
    rows = rows.contiguous()
    start_and_wait(
        lambda async_op: dist.all_to_all_single(
            received, rows, recv, send, group=process_group, async_op=async_op
        ),
        process_group,
        rows.device,
        f"rows of {of(layer)}",
        exchange_timeout,
    )
    own = send[process_group.rank()]
    count_bytes(group, (rows.shape[0] - own) * rows[0:1].numel() * rows.element_size())
    return received


def _exchange_fake(
    rows: Tensor, send_counts: Tensor, recv_counts: Tensor, group: str, **waiting: Any
) -> Tensor:
    """Of two rows or more, for the compiler's sake: torchair asks of every size whether it is 0.
    Nothing in a graph around it depends on that."""
    return rows.new_empty((data_dependent_size(least=2), *rows.shape[1:]))


def _agree(tensors: list[Tensor], group: str, plans: str, timeout: float) -> None:
    """As ``exchange_counts`` with ``plans``, for graphs without it. ``tensors``: of the device."""
    ensure(group, plans, timeout)


def _agree_fake(tensors: list[Tensor], group: str, plans: str, timeout: float) -> None:
    return None


def _keep(buffers: list[Tensor]) -> None:
    """Does nothing: until it has run the buffers are not free."""


def _wait(
    handle: Tensor,
    sent: Tensor,
    send_counts: Tensor,
    recv_counts: Tensor,
    group: str,
    num_rows: int | None = None,
    **waiting: Any,
) -> Tensor:
    """``waiting``: ``layer`` and ``exchange_timeout``, of the gradient's exchange."""
    pending = _pending.pop(int(handle), None)
    if pending is None:
        raise RuntimeError(
            f"moe_fx::wait: exchange {int(handle)} was never started or has been waited for already"
        )
    if pending.given != sent.data_ptr():
        raise RuntimeError(
            "moe_fx::wait: was not given the rows that all_to_all sends, but another tensor; the "
            "rows being sent may have been overwritten. Pass the same tensor to both."
        )
    if pending.work is not None:
        pending.work.wait()
    return pending.received


def _wait_fake(
    handle: Tensor,
    sent: Tensor,
    send_counts: Tensor,
    recv_counts: Tensor,
    group: str,
    num_rows: int | None = None,
    **waiting: Any,
) -> Tensor:
    size = data_dependent_size() if num_rows is None else num_rows
    return sent.new_empty((size, *sent.shape[1:]))


def _wait_after(*args: Any) -> Tensor:
    """``wait``, once ``after`` (the last argument) has been computed or started: a compiler that
    knows no order but that of dependencies keeps this one. For graphs whose gradients are there
    already."""
    return _wait(*args[:-1])


def _wait_after_fake(*args: Any) -> Tensor:
    return _wait_fake(*args[:-1])


def _wait_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    _handle, sent, send_counts, recv_counts, group, _num_rows = inputs
    ctx.save_for_backward(send_counts, recv_counts)
    ctx.group, ctx.num_sent = group, sent.shape[0]
    layer, timeout = keyword_only_inputs["layer"], keyword_only_inputs["exchange_timeout"]
    ctx.waiting = {"layer": f"{of(layer)}, backward", "exchange_timeout": timeout}


def _wait_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    send_counts, recv_counts = ctx.saved_tensors
    grad = grad.contiguous()
    handle = torch.ops.moe_fx.all_to_all(grad, recv_counts, send_counts, ctx.group, **ctx.waiting)
    returned = torch.ops.moe_fx.wait(
        handle, grad, recv_counts, send_counts, ctx.group, ctx.num_sent, **ctx.waiting
    )
    return None, returned, None, None, None, None


define(
    "exchange_counts(Tensor counts, str group, str? plans=None, float timeout=0.0, "
    f"int chunks=1, {WAITING}) -> Tensor",
    _exchange_counts,
    _exchange_counts_fake,
)
define(
    "split_sizes(Tensor counts, Tensor recv_counts, int chunks=1) -> Tensor",
    _split_sizes,
    _split_sizes_fake,
)
define(
    "all_to_all(Tensor rows, Tensor send_counts, Tensor recv_counts, str group, "
    f"{WAITING}) -> Tensor",
    _all_to_all,
    _all_to_all_fake,
    any_layout=True,
)
define("keep(Tensor[] buffers) -> ()", _keep, _keep)
has_side_effect(torch.ops.moe_fx.keep.default)
define("agree(Tensor[] tensors, str group, str plans, float timeout) -> ()", _agree, _agree_fake)
has_side_effect(torch.ops.moe_fx.agree.default)
define(
    "exchange(Tensor rows, Tensor send_counts, Tensor recv_counts, str group, "
    f"{WAITING}) -> Tensor",
    _exchange,
    _exchange_fake,
)
define(
    "wait(Tensor handle, Tensor sent, Tensor send_counts, Tensor recv_counts, str group, "
    f"SymInt? num_rows=None, {WAITING}) -> Tensor",
    _wait,
    _wait_fake,
    backward=_wait_backward,
    setup_context=_wait_setup,
    any_layout=True,
)
define(
    "wait_after(Tensor handle, Tensor sent, Tensor send_counts, Tensor recv_counts, str group, "
    "SymInt? num_rows, Tensor[] after) -> Tensor",
    _wait_after,
    _wait_after_fake,
    any_layout=True,
)
