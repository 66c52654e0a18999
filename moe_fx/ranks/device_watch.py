"""Exchanges of a device, where no host waits: watched from beside, and ended if they hang.

After each exchange an event is recorded on its stream. A thread looks at events that are older than
a rank's patience and, like a rank that waits itself, says in the group's store where this one
stands. An exchange that does not end in time is logged, the group is aborted, which lets the stream
go on, and the thread that runs the model gets the error as soon as it is back from the device:
before it can use any value, since those that hung are not results. In backward, autograd's own
thread may start the next exchange before that: `launch_unless_ended` raises the same error there.

Events are used again and never destroyed. On an H200 (torch 2.11) that thread was seen to stand
where it let go of the last reference to one, as long as an exchange hung that the model waited for
in ``tensor.cpu()``.

Nothing is recorded while a CUDA graph is captured, and none of its replays is watched.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moe_fx.compat import abort_group, in_backward
from moe_fx.errors import MoeFxError, RanksDiffer
from moe_fx.ranks import presence
from moe_fx.ranks.presence import Stand, patience

__all__ = ["launch_unless_ended", "raise_in", "take_back", "watch"]

log = logging.getLogger("moe_fx")
T = TypeVar("T")

Failure = Callable[[dist.ProcessGroup, Stand, float, float, Exception | None], MoeFxError]


@dataclass(eq=False)
class _Watched:
    event: Any
    group: dist.ProcessGroup
    device: torch.device
    stand: Stand
    timeout: float
    failure: Failure
    began: float
    said: bool = False


_watched: deque[_Watched] = deque()
_spare: dict[torch.device, list[Any]] = {}
"""Events of exchanges that are over."""
_ended: dict[str, MoeFxError] = {}
"""What ended the exchanges of a group, by its name."""
_changed = threading.Condition()
"""Held while these are looked at or changed."""
_thread: threading.Thread | None = None
_model_thread = threading.main_thread().ident


def watch(
    group: dist.ProcessGroup, device: torch.device, stand: Stand, timeout: float, failure: Failure
) -> None:
    """The exchange that the current stream has just been made to wait for. ``failure``: what makes
    the error (`moe_fx.ranks.waiting.failure`). Only CUDA's are watched."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    global _model_thread
    if not in_backward():
        _model_thread = threading.get_ident()
    event = spare_event(device) or torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    add(_Watched(event, group, device, stand, timeout, failure, time.monotonic()))


def launch_unless_ended(group: dist.ProcessGroup, launch: Callable[[], T]) -> T:
    """``launch()``, an exchange of the group; the error that ended the group's exchanges, if one
    did."""
    try:
        if group.group_name not in _ended:
            return launch()
    except RuntimeError as refusal:  # the group may have been aborted meanwhile
        if group.group_name not in _ended:
            raise
        cause: RuntimeError | None = refusal
    else:
        cause = None
    take_back(_model_thread)
    raise _ended[group.group_name] from cause


def spare_event(device: torch.device) -> Any:
    """One of an exchange that is over; None if there is none."""
    with _changed:
        spare = _spare.get(device)
        return spare.pop() if spare else None


def add(watched: _Watched) -> None:
    """``watched.event`` has a ``query()`` that says whether the exchange is over."""
    global _thread
    with _changed:
        while _watched and not _watched[0].said and _watched[0].event.query():
            _drop(_watched[0])
        _watched.append(watched)
        if _thread is None:
            _thread = threading.Thread(target=_look_on, name="moe_fx device watch", daemon=True)
            _thread.start()
        _changed.notify()


def _look_on() -> None:
    while True:
        with _changed:
            _changed.wait_for(lambda: _watched)
            first = _watched[0]
        waited = time.monotonic() - first.began
        pause = patience(first.timeout)
        if waited >= pause and _is_over(first, waited):
            continue
        time.sleep(pause if waited >= pause else pause - waited)


def _is_over(watched: _Watched, waited: float) -> bool:
    """One look at an exchange that takes long; takes it from the list if it has come to an end."""
    with _changed:
        if watched not in _watched:
            return True
        over, said, watched.said = watched.event.query(), watched.said, True
        if over:
            _drop(watched)
    if over:
        if said:
            presence.say(watched.group, None)
        return True
    error = _error(watched, waited, said)
    if error is None:
        return False
    _end(watched, error)
    return True


def _drop(watched: _Watched) -> None:
    _watched.remove(watched)
    _spare.setdefault(watched.device, []).append(watched.event)


def _error(watched: _Watched, waited: float, said: bool) -> MoeFxError | None:
    group, stand = watched.group, watched.stand
    if waited > watched.timeout:
        return watched.failure(group, stand, waited, watched.timeout, None)
    try:
        if not said:
            presence.say(group, stand)
        how = presence.crossed(group, stand)
    except RuntimeError as refusal:  # the store has gone with the rank that served it
        return watched.failure(group, stand, waited, watched.timeout, refusal)
    return RanksDiffer(presence.differing(how)) if how else None


def _end(watched: _Watched, error: MoeFxError) -> None:
    log.error("%s", error)
    _ended[watched.group.group_name] = error
    raise_in(_model_thread, error)
    with _changed:
        while _watched:
            _drop(_watched[0])
    abort_group(watched.group, watched.device)


def raise_in(thread: int | None, error: MoeFxError) -> None:
    """Raise ``error`` in another thread, once it runs Python again."""
    kind, text = type(error), str(error)

    class Raised(kind):  # type: ignore[misc, valid-type]
        """Python makes the exception there, without arguments."""

        def __init__(self) -> None:
            super().__init__(text)

    Raised.__name__ = Raised.__qualname__ = kind.__name__
    Raised.__module__ = kind.__module__
    if thread is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Raised))


def take_back(thread: int | None) -> None:
    """An error that `raise_in` left and that the thread has not got yet: it gets another."""
    if thread is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)
