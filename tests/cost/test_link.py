"""The link, and its calibration on real ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_fx.cost.link import Link, calibrate, known
from moe_fx.ranks.groups import require_group
from moe_fx.testing import RankPool

CPU = torch.device("cpu")


def test_several_exchanges_in_flight_go_at_another_rate() -> None:
    link = Link(latency=1.0, alone=0.8, two=0.6, busy=0.2)
    found = [link.rate(in_flight) for in_flight in (1, 2, 4, 8, 20)]
    assert found == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2])


def _calibrated(rank: int) -> tuple[Link, bool]:
    group = require_group(None)
    first = calibrate(group, CPU)
    return first, calibrate(group, CPU) is first


def test_ranks_calibrate_to_the_same_numbers_once(ranks2: RankPool) -> None:
    (first, cached_first), (second, cached_second) = ranks2.run(_calibrated)
    assert first == second
    assert cached_first and cached_second
    assert 0 < first.latency < 1
    assert 0 < first.busy <= first.two <= first.alone < 1e-6


def _known_before_and_after(rank: int) -> tuple[Link | None, bool]:
    group = dist.new_group()
    before = known(group, CPU)
    return before, calibrate(group, CPU) == known(group, CPU)


def test_a_link_is_known_once_it_was_measured(ranks2: RankPool) -> None:
    assert ranks2.run(_known_before_and_after) == [(None, True)] * 2


def _calibrated_anew_while_tracing(rank: int) -> Link:
    group = dist.new_group()
    with FakeTensorMode():
        return calibrate(group, CPU)


def test_calibrates_while_a_compiler_traces(ranks2: RankPool) -> None:
    first, second = ranks2.run(_calibrated_anew_while_tracing)
    assert first == second
    assert isinstance(first.alone, float) and first.alone > 0


def _calibrated_alone(rank: int) -> Link:
    groups = [dist.new_group([other]) for other in range(2)]
    return calibrate(groups[rank], CPU)


def test_a_group_of_one_has_a_link_that_costs_nothing(ranks2: RankPool) -> None:
    assert ranks2.run(_calibrated_alone) == [Link(0.0, 0.0, 0.0, 0.0)] * 2
