"""Exchanges that no host waits for are watched from beside: here with events that tests set."""

from __future__ import annotations

import threading
import time
from typing import ClassVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe_fx.errors import MoeFxError, RankMissing
from moe_fx.ranks import device_watch, presence, waiting
from moe_fx.ranks.device_watch import _Watched
from moe_fx.ranks.waiting import failure
from moe_fx.testing import RankPool

WAIT = 1.0
LAYER = "model.layers.1.mlp (model.py:7)"


class Event:
    """Of an exchange that is over once it was aborted, or when it says so."""

    destroyed_in: ClassVar[list[str]] = []

    def __init__(self, over: bool = False) -> None:
        self.over = threading.Event()
        if over:
            self.over.set()

    def query(self) -> bool:
        return self.over.is_set()

    def __del__(self) -> None:
        self.destroyed_in.append(threading.current_thread().name)


DEVICE = torch.device("cuda", 0)


def watched(
    group: dist.ProcessGroup, event: Event, timeout: float = WAIT, device: torch.device = DEVICE
) -> _Watched:
    stand = presence.next_exchange(group, f"rows of {LAYER}")
    return _Watched(event, group, device, stand, timeout, failure, time.monotonic())


def wait_beside(rank: int, absent: int) -> str:
    """The thread that runs the model waits in C, as for a device, until the group is aborted."""
    group = dist.new_group()
    if rank == absent:
        return ""
    event = Event()
    with mock.patch.object(device_watch, "abort_group", lambda *_: event.over.set()):
        try:
            device_watch.add(watched(group, event))
            event.over.wait(60)
            return "a value that hung was used"
        except RankMissing as error:
            return str(error)


def test_the_thread_that_runs_the_model_gets_the_error_before_any_value(ranks2: RankPool) -> None:
    message, _ = ranks2.run(wait_beside, 1)
    assert message.startswith("Rank 0 waited 1")
    assert f"in exchange 1 (rows of {LAYER})" in message
    assert "for rank(s) [1], which did not come to it" in message


def go_on(rank: int, raises: bool) -> tuple[str, list[str]]:
    """After an exchange was ended, autograd's thread starts the next before the thread that runs
    the model is back: what that one gets, and what the model gets that awaits it."""
    group = dist.new_group()
    if rank == 1:
        return "", []
    event = Event()

    def launch() -> None:
        if raises:
            event.over.wait(60)
        raise RuntimeError("the communicator was aborted")

    found: list[str] = []
    over = threading.Lock()
    over.acquire()

    def backward() -> None:
        try:
            if not raises:
                event.over.wait(60)
            device_watch.launch_unless_ended(group, launch)
        except RuntimeError as error:
            found.append(f"{type(error).__name__}: {error}")
        over.release()

    with mock.patch.object(device_watch, "abort_group", lambda *_: event.over.set()):
        try:
            device_watch.add(watched(group, event))
            threading.Thread(target=backward).start()
            over.acquire()  # no line of Python runs in this thread meanwhile
            return "nothing more", found
        except RankMissing as error:
            return str(error), found


@pytest.mark.parametrize("raises", [False, True], ids=["ended before", "ended meanwhile"])
def test_an_exchange_of_a_group_that_has_ended_gets_the_error(
    ranks2: RankPool, raises: bool
) -> None:
    said, found = ranks2.run(go_on, raises)[0]
    assert said == "nothing more"
    assert len(found) == 1
    assert found[0].startswith("RankMissing: Rank 0 waited 1")


def refused(rank: int, message: str) -> str:
    """What a rank gets whose exchange the link refuses to start, as NCCL does when a peer's process
    has ended."""
    group = dist.new_group()
    if rank == 1:
        return ""

    def launch() -> None:
        raise RuntimeError(message)

    with mock.patch.object(waiting, "group_timeout", lambda *_: 60.0):
        try:
            waiting.start(launch, group, DEVICE, f"rows of {LAYER}", WAIT)
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
    return "started"


def test_a_link_that_refuses_an_exchange_names_layer_and_rank(ranks2: RankPool) -> None:
    message = "NCCL Error 6: remote process exited or there was a network error"
    said, _ = ranks2.run(refused, message)
    assert said.startswith("RankMissing: Rank 0 waited 0 s")
    assert f"(rows of {LAYER})" in said
    assert "for rank(s) [1]" in said
    assert message in said


def test_a_mistake_of_another_kind_stays_what_it_is(ranks2: RankPool) -> None:
    said, _ = ranks2.run(refused, "split sizes do not add up")
    assert said == "RuntimeError: split sizes do not add up"


def fine(rank: int) -> int:
    """Exchanges that end, one of them late; how many are still watched."""
    group = dist.new_group()
    late = Event()
    with mock.patch.object(device_watch, "abort_group", side_effect=MoeFxError):
        device_watch.add(watched(group, Event(over=True)))
        device_watch.add(watched(group, late, timeout=20 * WAIT))
        threading.Timer(0.1, late.over.set).start()
        late.over.wait()
        device_watch.add(watched(group, Event(over=True)))
    return len(device_watch._watched)


def test_exchanges_that_end_are_let_go(ranks2: RankPool) -> None:
    assert ranks2.run(fine) == [1, 1]


def steps(rank: int) -> tuple[list[str], int]:
    """Threads that destroyed an event, and how many events three steps took: of each, one exchange
    is over when the next begins, and one only when the other thread has looked."""
    group, device = dist.new_group(), torch.device("cuda", 1)
    made: list[Event] = []
    for _ in range(3):
        for over in (True, False):
            event = device_watch.spare_event(device)
            if event is None:
                event = Event()
                made.append(event)
            event.over.set() if over else event.over.clear()
            device_watch.add(watched(group, event, device=device))
        event.over.set()
        while device_watch._watched:
            time.sleep(0.01)
    count = len(made)
    del event
    made.clear()
    return Event.destroyed_in, count


def test_the_thread_that_looks_destroys_no_event(ranks2: RankPool) -> None:
    """CUDA would let it wait until the exchange is over that it is to end."""
    for destroyed_in, count in ranks2.run(steps):
        assert destroyed_in == []
        assert count == 2


def test_an_error_arrives_in_another_thread_with_its_text() -> None:
    found: list[str] = []
    ready = threading.Event()

    def work() -> None:
        try:
            ready.set()
            while True:
                time.sleep(0.01)
        except RankMissing as error:
            found.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    device_watch.raise_in(thread.ident, RankMissing("rank 1 is gone"))
    thread.join(30)
    assert found == ["rank 1 is gone"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to watch")
def test_nothing_is_watched_on_the_host(ranks2: RankPool) -> None:
    assert ranks2.run(_host) == [0, 0]


def _host(rank: int) -> int:
    group = dist.new_group()
    before = len(device_watch._watched)
    counts = torch.ones(4, dtype=torch.int64)
    torch.ops.moe_fx.exchange_counts(counts, group.group_name)
    return len(device_watch._watched) - before
