"""Each token once to every rank that has one of its experts, and one row back from each: nothing is
counted, and the host learns no size from a device.

::

    rows, here, factors = direct_dispatch(tokens, ids, weights)
    shares = the experts of this rank on rows, by here, times factors, summed     # [R, H]
    out = direct_combine(shares, None, here, ids)[0]

A row's place is (source rank, token), which both sides know before anything is sent. That experts'
results are summed where the experts are, before they travel, is another order of the same sum: each
rank's share is rounded to the rows' dtype, and the shares are summed in float32.

Shapes: ``T`` tokens of this rank, ``M`` the most of any rank in this step, ``W`` ranks,
``R = W * M`` places, ``K`` experts per token, ``E`` experts, ``L = E / W`` of this rank.

Here for any backend of torch.distributed: the tokens, in exact sizes, which the host knows from the
ids of all ranks. On GPUs that can write to each other's memory: `moe_fx.devices.cuda.direct`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe_fx.compat import all_gather_single, data_dependent_size, resolve_group
from moe_fx.ops._define import define
from moe_fx.ops.exchange import count_bytes
from moe_fx.ops.fused import ARGUMENTS, NUM_ARGUMENTS
from moe_fx.ranks.agree import ensure
from moe_fx.ranks.waiting import TIMEOUT, WAITING, of, start_and_wait

__all__ = ["combined", "dispatched"]

_NOBODY = -1


def _here(ids: Tensor, rank: int, world: int, num_experts: int) -> Tensor:
    """``ids`` as int32 among the experts of ``rank``, -1 where they are not its."""
    local = num_experts // world
    own = ids.to(torch.int32) - rank * local
    return torch.where((own >= 0) & (own < local), own, _NOBODY)


def _has_some(here: Tensor) -> Tensor:
    return (here >= 0).any(-1)


def _padded(values: Tensor, most: int, fill: float) -> Tensor:
    """``[T, ...]`` to ``[M, ...]``."""
    sides = [0, 0] * (values.dim() - 1) + [0, most - values.shape[0]]
    return F.pad(values, sides, value=fill)


def _column(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.dim() - 1))


# -- what a rank gets, of what all ranks give: for simulations -------------------------------------


def dispatched(
    tokens: Sequence[Tensor],
    ids: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    rank: int,
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``direct_dispatch`` at ``rank``, of the arguments of all ranks."""
    world, most = len(tokens), max(len(each) for each in tokens)
    here = [_here(each, rank, world, num_experts) for each in ids]
    rows = [
        _padded(torch.where(_column(_has_some(own), each), each, 0), most, 0.0)
        for each, own in zip(tokens, here, strict=True)
    ]
    factors = [_padded(each, most, 0.0) for each in weights if each is not None]
    every_here = torch.cat([_padded(each, most, _NOBODY) for each in here])
    return torch.cat(rows), every_here, torch.cat(factors) if factors else rows[0].new_empty(0)


def combined(rows: Sequence[Tensor], here: Sequence[Tensor], num_tokens: int, rank: int) -> Tensor:
    """The rows of ``direct_combine`` at ``rank``, which has so many tokens, of what all ranks
    give."""
    world = len(rows)
    total = rows[rank].new_zeros((num_tokens, *rows[rank].shape[1:]), dtype=_wide(rows[rank]))
    for each, own in zip(rows, here, strict=True):
        its, has = (
            value.view(world, -1, *value.shape[1:])[rank][:num_tokens]
            for value in (each, _has_some(own))
        )
        total = total + torch.where(_column(has, its), its.to(total.dtype), 0)
    return total.to(rows[rank].dtype)


def _wide(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


# -- over a group ----------------------------------------------------------------------------------


def _dispatch(
    tokens: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    num_experts: int,
    group: str,
    plans: str | None = None,
    timeout: float = 0.0,
    *,
    layer: str = "",
    exchange_timeout: float = TIMEOUT,
) -> tuple[Tensor, Tensor, Tensor]:
    """``tokens [T, ...]``, ``ids [T, K]``, ``weights [T, K]`` to the rows at their places
    ``[R, ...]``, ``here [R, K]`` int32, which expert of this rank each pair is for (-1: none, or
    there is no token), and their weights ``[R, K]`` (without weights ``[0]``). Rows of tokens that
    have no expert here are 0. ids that are no expert's (-1) go nowhere.

    ``plans``, ``timeout``, ``layer``, ``exchange_timeout``: as of ``exchange_counts``."""
    if plans is not None:
        ensure(group, plans, timeout)
    link = _Link(resolve_group(group), tokens.device, f"tokens of {of(layer)}", exchange_timeout)
    rank, world = link.rank, link.world
    lengths = link.gathered(torch.tensor([len(tokens)], device=tokens.device)).tolist()
    most = max(lengths)
    every = link.gathered(_padded(ids.to(torch.int32), most, _NOBODY))
    here = _here(every, rank, world, num_experts)
    factors = tokens.new_empty(0)
    if weights is not None:
        factors = link.gathered(_padded(weights, most, 0.0))
    wanted = [_has_some(_here(ids, other, world, num_experts)) for other in range(world)]
    sent = torch.cat([tokens[mask] for mask in wanted])
    some = _has_some(here)
    arrived = link.exchanged(
        sent, [int(mask.sum()) for mask in wanted], some.view(world, -1).sum(1).tolist()
    )
    rows = tokens.new_zeros((world * most, *tokens.shape[1:]))
    rows[some] = arrived
    link.count(group, sent, int(wanted[rank].sum()))
    return rows, here, factors


def _combine(
    rows: Tensor,
    factors: Tensor | None,
    here: Tensor,
    ids: Tensor,
    num_experts: int,
    group: str,
    *,
    layer: str = "",
    exchange_timeout: float = TIMEOUT,
) -> tuple[Tensor, Tensor]:
    """``rows [R, ...]``, of ``direct_dispatch``, to ``[T, ...]``: the sum of what the ranks that
    have one of a token's experts give. ``here``: what ``direct_dispatch`` gave of ``ids [T, K]``.
    ``factors [R, K]`` to ``[T, K]``: what the rank of each pair's expert gives, 0 where there is
    none (without factors ``[0]``)."""
    link = _Link(resolve_group(group), rows.device, f"results of {of(layer)}", exchange_timeout)
    rank, world = link.rank, link.world
    some = _has_some(here)
    wanted = [_has_some(_here(ids, other, world, num_experts)) for other in range(world)]
    recv = [int(mask.sum()) for mask in wanted]
    send = some.view(world, -1).sum(1).tolist()
    sent = rows[some]
    arrived = link.exchanged(sent, send, recv)
    total = rows.new_zeros((len(ids), *rows.shape[1:]), dtype=_wide(rows))
    for mask, its in zip(wanted, arrived.split(recv), strict=True):
        total[mask] += its.to(total.dtype)
    link.count(group, sent, send[rank])
    returned = rows.new_empty(0)
    if factors is not None:
        every = link.exchanged(factors, *[[len(factors) // world] * world] * 2)
        owner = torch.div(ids.long(), num_experts // world, rounding_mode="floor")
        real = (ids >= 0) & (ids < num_experts)
        by_rank = every.view(world, -1, ids.shape[1])[:, : len(ids)]
        picked = by_rank.gather(0, torch.where(real, owner, 0).unsqueeze(0)).squeeze(0)
        returned = torch.where(real, picked, 0)
    return total.to(rows.dtype), returned


class _Link:
    """Exchanges of one layer."""

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, what: str, timeout: float
    ) -> None:
        self.group, self.device, self.what, self.timeout = group, device, what, timeout
        self.rank, self.world = group.rank(), group.size()

    def gathered(self, value: Tensor) -> Tensor:
        """Of all ranks, which have as many."""
        value = value.contiguous()
        every = value.new_empty((self.world * value.shape[0], *value.shape[1:]))
        self._run(
            lambda async_op: all_gather_single(every, value, group=self.group, async_op=async_op)
        )
        return every

    def exchanged(self, rows: Tensor, send: list[int], recv: list[int]) -> Tensor:
        rows = rows.contiguous()
        arrived = rows.new_empty((sum(recv), *rows.shape[1:]))
        self._run(
            lambda async_op: dist.all_to_all_single(
                arrived, rows, recv, send, group=self.group, async_op=async_op
            )
        )
        return arrived

    def count(self, name: str, sent: Tensor, own: int) -> None:
        """Of the rows sent, so many to this rank itself."""
        count_bytes(name, (len(sent) - own) * sent[0:1].numel() * sent.element_size())

    def _run(self, launch: Callable[[bool], Any]) -> None:
        start_and_wait(launch, self.group, self.device, self.what, self.timeout)


def _experts(*args: Any, **waiting: Any) -> Tensor:
    """``direct_dispatch``, ``fused_experts`` of this rank's tables and ``direct_combine``, as one:
    no size within depends on other ranks as far as a compiler can see."""
    tokens, ids, weights, *of_layer = args[:NUM_ARGUMENTS]
    num_experts, group, *agreed = args[NUM_ARGUMENTS:]
    rows, here, factors = _dispatch(tokens, ids, weights, num_experts, group, *agreed, **waiting)
    its = None if weights is None else factors
    shares = torch.ops.moe_fx.fused_experts(rows, here, its, *of_layer)
    return _combine(shares, None, here, ids, num_experts, group, **waiting)[0]


def _dispatch_fake(
    tokens: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    num_experts: int,
    group: str,
    plans: str | None = None,
    timeout: float = 0.0,
    **waiting: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    places = data_dependent_size()
    return (
        tokens.new_empty((places, *tokens.shape[1:])),
        ids.new_empty((places, ids.shape[1]), dtype=torch.int32),
        tokens.new_empty(0) if weights is None else weights.new_empty((places, ids.shape[1])),
    )


def _combine_fake(
    rows: Tensor,
    factors: Tensor | None,
    here: Tensor,
    ids: Tensor,
    num_experts: int,
    group: str,
    **waiting: Any,
) -> tuple[Tensor, Tensor]:
    return (
        rows.new_empty((ids.shape[0], *rows.shape[1:])),
        rows.new_empty(0) if factors is None else factors.new_empty(ids.shape),
    )


def _experts_fake(*args: Any, **waiting: Any) -> Tensor:
    tokens, _, _, _, _, down = args[:6]
    return tokens.new_empty((tokens.shape[0], down.shape[2]), dtype=args[NUM_ARGUMENTS - 1])


# -- gradients -------------------------------------------------------------------------------------


def _backward_of(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "layer": f"{of(kwargs['layer'])}, backward"}


def _dispatch_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    _, ids, weights, ctx.num_experts, ctx.group = inputs[:5]
    ctx.save_for_backward(ids, output[1])
    ctx.weighs, ctx.waiting = weights is not None, _backward_of(keyword_only_inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.num_inputs = len(inputs)


def _dispatch_backward(ctx: Any, grad: Tensor, _here: Any, grad_factors: Tensor) -> tuple[Any, ...]:
    ids, here = ctx.saved_tensors
    given = grad_factors if ctx.weighs else None
    of_tokens, of_weights = torch.ops.moe_fx.direct_combine(
        grad, given, here, ids, ctx.num_experts, ctx.group, **ctx.waiting
    )
    rest = [None] * (ctx.num_inputs - 3)
    return of_tokens, None, of_weights if ctx.weighs else None, *rest


def _combine_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    _, _, _, ids, ctx.num_experts, ctx.group = inputs
    ctx.save_for_backward(ids)
    ctx.waiting = _backward_of(keyword_only_inputs)
    ctx.mark_non_differentiable(output[1])


def _combine_backward(ctx: Any, grad: Tensor, _factors: Any) -> tuple[Any, ...]:
    (ids,) = ctx.saved_tensors
    rows, _, _ = torch.ops.moe_fx.direct_dispatch(
        grad.contiguous(), ids, None, ctx.num_experts, ctx.group, **ctx.waiting
    )
    return rows, None, None, None, None, None


_AGREED = "str? plans=None, float timeout=0.0"
define(
    "direct_dispatch(Tensor tokens, Tensor ids, Tensor? weights, int num_experts, str group, "
    f"{_AGREED}, {WAITING}) -> (Tensor rows, Tensor here, Tensor factors)",
    _dispatch,
    _dispatch_fake,
    backward=_dispatch_backward,
    setup_context=_dispatch_setup,
)
define(
    "direct_combine(Tensor rows, Tensor? factors, Tensor here, Tensor ids, int num_experts, "
    f"str group, {WAITING}) -> (Tensor rows, Tensor factors)",
    _combine,
    _combine_fake,
    backward=_combine_backward,
    setup_context=_combine_setup,
)
define(
    f"direct_experts({ARGUMENTS}, int num_experts, str group, {_AGREED}, {WAITING}) -> Tensor",
    _experts,
    _experts_fake,
)
