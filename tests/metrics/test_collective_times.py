"""Check the times of collectives: bytes over the slowest link, hops of the ring, and when a tree is faster."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tinytrain_dist.metrics.collective_times import RankGroup, all_reduce_time, all_to_all_time, gather_time
from tinytrain_dist.metrics.device_specs import DEVICE_SPECS, REACHABLE_SHARE_OF_LINKS

H100 = DEVICE_SPECS["h100"]
GIGABYTE = 1e9


def test_a_large_message_takes_its_bytes_over_the_slowest_link() -> None:
    node, four_nodes, one_per_node = RankGroup(8, 8, 8), RankGroup(32, 8, 8), RankGroup(4, 1, 8)
    for group, bandwidth in ((node, 450e9), (four_nodes, 400e9), (one_per_node, 400e9 / 8)):
        sent = GIGABYTE * (group.ranks - 1) / group.ranks
        expected = sent / (bandwidth * REACHABLE_SHARE_OF_LINKS)
        assert gather_time(GIGABYTE, group, H100).transfer == pytest.approx(expected)
        ring = all_reduce_time(GIGABYTE, replace(group), H100)
        assert ring.transfer == pytest.approx(2 * expected)


def test_the_latency_is_that_of_all_hops() -> None:
    """Simple: 8.4 us, and 3.4 for each hop inside a node, 14 to another; LL: 6.6, 0.6 and 2.7."""
    large, small = gather_time(GIGABYTE, RankGroup(16, 8, 8), H100), gather_time(8, RankGroup(16, 8, 8), H100)
    assert large.latency == pytest.approx((8.4 + 14 * 3.4 + 14.0) * 1e-6)
    assert small.latency == pytest.approx((6.6 + 14 * 0.6 + 2.7) * 1e-6)
    pcie = gather_time(8, RankGroup(8, 8, 8), DEVICE_SPECS["l40s"])
    assert pcie.latency == pytest.approx((6.6 + 7 * 1.0) * 1e-6)


def test_a_small_all_reduce_of_many_ranks_takes_a_tree() -> None:
    group = RankGroup(1024, 8, 8)
    tree = all_reduce_time(8, group, H100).latency
    assert tree == pytest.approx((6.8 + 2 * (7 * 0.6 + 7 * 5.0)) * 1e-6)
    assert gather_time(8, group, H100).latency > 8 * tree, "a ring passes every rank"


def test_an_all_to_all_sends_parts_for_other_nodes_over_the_network() -> None:
    on_node, on_two, one_per_node = RankGroup(8, 8, 8), RankGroup(8, 4, 8), RankGroup(2, 1, 8)
    assert all_to_all_time(GIGABYTE, on_node, H100) == gather_time(GIGABYTE, on_node, H100)
    # half of each message, over an eighth of the network; the rest stays inside and takes less time
    for group in (on_two, one_per_node):
        found = all_to_all_time(GIGABYTE, group, H100)
        assert found.transfer == pytest.approx(GIGABYTE / 2 / (400e9 / 8 * REACHABLE_SHARE_OF_LINKS))
        assert found.latency == gather_time(GIGABYTE, group, H100).latency
    fast = replace(H100, network=8 * 8 * 450e9)
    assert all_to_all_time(GIGABYTE, on_two, fast).transfer == pytest.approx(
        GIGABYTE * 3 / 8 / (450e9 * REACHABLE_SHARE_OF_LINKS)
    )


def test_a_single_rank_sends_nothing() -> None:
    assert gather_time(GIGABYTE, RankGroup(1, 1, 8), H100).seconds == 0
    assert all_reduce_time(GIGABYTE, RankGroup(1, 1, 8), H100).seconds == 0


def test_more_bandwidth_never_takes_longer() -> None:
    for nbytes in (8, 1e5, 1e7, 1e9):
        for group in (RankGroup(8, 8, 8), RankGroup(64, 8, 8), RankGroup(64, 1, 8)):
            faster = [replace(H100, neighbours=450e9 * factor, network=400e9 * factor) for factor in (0.5, 1, 2, 4)]
            for time_of in (gather_time, all_reduce_time):
                seconds = [time_of(nbytes, group, device).seconds for device in faster]
                assert seconds == sorted(seconds, reverse=True)
