"""Exchanges that end: each is waited for so long and no longer, and then says who is missing.

::

    exchange = start(lambda: dist.all_to_all_single(..., async_op=True), group, device,
                     "rows of model.layers.3.mlp", timeout)
    exchange.wait()  # raises `RankMissing` or `RanksDiffer` on every rank that waits

The timeout is the shorter of ``timeout`` and the group's own. An exchange that is in time costs
two calls more and no message; `moe_fx.ranks.presence` has what ranks tell each other after a while.

On a device the host does not wait for an exchange, and must not: there `moe_fx.ranks.device_watch`
waits beside it.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_fx.compat import group_timeout, launch_within
from moe_fx.errors import MoeFxError, RankMissing, RanksDiffer
from moe_fx.ranks import presence
from moe_fx.ranks.device_watch import launch_unless_ended, watch
from moe_fx.ranks.presence import Stand, named, patience

__all__ = [
    *("BROKEN", "TIMEOUT", "WAITING", "Exchange"),
    *("came_late", "failure", "of", "start", "start_and_wait"),
]

TIMEOUT = 300.0
"""Seconds, unless told otherwise."""
WAITING = f'*, str layer="", float exchange_timeout={TIMEOUT}'
"""How ops that exchange are told for whom, and how long they may wait."""
BROKEN = "The group cannot be used any more."
_UNNAMED = "an MoE layer"
_TORCH = os.path.dirname(torch.__file__)
_OWN = os.path.dirname(__file__)
_BEFORE = 0.9
"""Of a device's own timeout: to say who is missing before it strikes."""
_LATE = 2.0
"""Seconds that the backend's own timeout may come late."""


@dataclass(frozen=True)
class Exchange:
    """One that is under way. ``work``: torch's handle; None: the stream waits already."""

    work: Any
    group: dist.ProcessGroup
    device: torch.device
    stand: Stand
    timeout: float

    def wait(self) -> None:
        """Wait for it; on a device, let the current stream wait."""
        if self.device.type == "cpu":
            self._wait()
        else:
            if self.work is not None:
                self.work.wait()
            watch(self.group, self.device, self.stand, self.timeout, failure)

    def _wait(self) -> None:
        began, stand = time.monotonic(), self.stand
        try:
            if _ends_within(self.work, patience(self.timeout)):
                return
            stand = _found(stand)
            presence.say(self.group, stand)
            while not _ends_within(self.work, patience(self.timeout)):
                differ = presence.crossed(self.group, stand)
                if differ:
                    raise RanksDiffer(presence.differing(differ))
                if time.monotonic() - began > self.timeout + _LATE:
                    raise TimeoutError("the exchange did not end")
            presence.say(self.group, None)
        except MoeFxError:
            raise
        except (RuntimeError, TimeoutError) as error:
            waited = time.monotonic() - began
            stand = _found(stand)
            raise failure(self.group, stand, waited, self.timeout, error) from error


def start(
    launch: Callable[[], Any],
    group: dist.ProcessGroup,
    device: torch.device,
    what: str,
    timeout: float,
) -> Exchange:
    """``launch()`` starts an exchange of tensors on ``device`` and returns torch's handle."""
    stand = presence.next_exchange(group, what)
    own = group_timeout(group, device)
    if device.type != "cpu":  # the backend's own watchdog, if it is shorter, ends the process
        timeout = min(timeout, _BEFORE * own)
        try:
            work = launch_unless_ended(group, launch)
        except RuntimeError as error:  # NCCL has seen a process end before anyone waits
            if isinstance(error, MoeFxError) or not _is_of_link(error):
                raise
            raise failure(group, stand, 0.0, timeout, error) from error
        return Exchange(work, group, device, stand, timeout)
    timeout = min(timeout, own)
    with launch_within(timeout, group, device):
        work = launch()
    return Exchange(work, group, device, stand, timeout)


def _is_of_link(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or str(error).startswith("NCCL")


def start_and_wait(
    launch: Callable[[bool], Any],
    group: dist.ProcessGroup,
    device: torch.device,
    what: str,
    timeout: float,
) -> None:
    """``launch(async_op)``, at once: on a device without a stream of its own."""
    on_host = device.type == "cpu"
    start(lambda: launch(on_host), group, device, what, timeout).wait()


def failure(
    group: dist.ProcessGroup, stand: Stand, waited: float, timeout: float, error: Exception | None
) -> RankMissing:
    """Why an exchange has not ended: who is missing, as far as the others can be asked. Takes some
    seconds, until all that wait have said so."""
    rank, seconds = group.rank(), f"{waited:.3g} s"
    text = f"Rank {rank} waited {seconds} in {stand} of the expert-parallel group"
    try:
        before = presence.gave_up(group)
        presence.say(group, stand)
        elsewhere = _elsewhere(group, stand, patience(timeout) + 1.0)
        presence.give_up(group)
    except (RuntimeError, TimeoutError) as refusal:
        text += (
            ". Which rank is missing cannot be said: the group's store does not answer either "
            f"({_line(refusal)}), and it lives in the process of rank 0 or of its launcher"
        )
    else:
        missing = sorted(elsewhere)
        if missing:
            text += f" for {named(group, missing)}, which did not come to it"
            text += "".join(
                f"; rank {other} waits in {its}" for other, its in elsewhere.items() if its
            )
        elif before:
            text += f", which {named(group, before)} had given up before this rank came to it"
        else:
            text += ", as all other ranks do: it is the link that fails"
    if error is not None and waited < timeout:
        text += f". The link reports: {_line(error)}"
    return RankMissing(
        f"{text}. Every rank must run every step: let transformers' generate() do so by "
        "synced_gpus=True on every rank, give every rank the same number of batches, and look for "
        "an error on a rank that is missing. For ranks that are only slow, raise exchange_timeout "
        f"(it is {timeout:g} s here). {BROKEN}"
    )


def came_late(group: dist.ProcessGroup, where: Any, gone: Sequence[int], end: str) -> RankMissing:
    """Of a rank that comes to ``where`` when others have stopped waiting."""
    return RankMissing(
        f"Rank {group.rank()} came to {where} of the expert-parallel group after "
        f"{named(group, gone)} had stopped waiting (exchange_timeout): this rank or another was "
        f"late, or did not come. {end}"
    )


def of(layer: str) -> str:
    """The layer as an error says it; "": one that the graph does not name."""
    return layer or _UNNAMED


def _found(stand: Stand) -> Stand:
    """Of a layer without a name: with the line that runs it."""
    if _UNNAMED not in stand.what or "(" in stand.what:
        return stand
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((_TORCH, _OWN, "<")):
            line = f"{_UNNAMED} (run at {frame.filename}:{frame.lineno})"
            return replace(stand, what=stand.what.replace(_UNNAMED, line))
    return stand


def _elsewhere(group: dist.ProcessGroup, stand: Stand, grace: float) -> dict[int, Stand | None]:
    """The ranks that do not wait in this exchange, ``grace`` seconds given to say so; with where
    else they wait, if they do."""
    deadline = time.monotonic() + grace
    while True:
        found = presence.others(group)
        away: dict[int, Stand | None] = {
            rank: found.get(rank)
            for rank in range(group.size())
            if rank != group.rank() and found.get(rank) != stand
        }
        if not away or time.monotonic() > deadline:
            return away
        time.sleep(0.1)


def _ends_within(work: Any, seconds: float) -> bool:
    """Whether it has; raises if it fails."""
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # what it failed with, if it did
    return True


def _line(error: Exception) -> str:
    """Its first sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0] if lines else repr(error)
