"""The link's arithmetic, and its calibration on real ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_fx.groups import require_group
from moe_fx.link import TYPICAL, Link, calibrate
from moe_fx.testing import RankPool

CPU = torch.device("cpu")


def test_seconds_of_one_exchange_and_of_several() -> None:
    link = Link(latency=1.0, alone=0.5, busy=0.25)
    assert link.seconds(8) == 1 + 4
    assert link.seconds(8, in_flight=2) == 2 * (1 + 2)


def test_the_typical_link_costs_its_latency_and_25_gigabytes_a_second() -> None:
    assert TYPICAL.seconds(0) == 30e-6
    assert abs(TYPICAL.seconds(25e9) - 1 - 30e-6) < 1e-12


def _calibrated(rank: int) -> tuple[Link, bool]:
    group = require_group(None)
    first = calibrate(group, CPU)
    return first, calibrate(group, CPU) is first


def test_ranks_calibrate_to_the_same_numbers_once(ranks2: RankPool) -> None:
    (first, cached_first), (second, cached_second) = ranks2.run(_calibrated)
    assert first == second
    assert cached_first and cached_second
    assert 0 < first.latency < 1
    assert 0 < first.busy <= first.alone < 1e-6


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
    assert ranks2.run(_calibrated_alone) == [Link(0.0, 0.0, 0.0)] * 2
