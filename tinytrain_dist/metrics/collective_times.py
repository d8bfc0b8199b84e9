"""Compute how long a collective of NCCL takes between GPUs, from its size and the links it crosses.

The model is the one with which NCCL 2.30 itself chooses an algorithm (src/graph/tuning.cc): time = latency of all hops
+ bytes / bandwidth, for each algorithm (ring; for all-reduce also a double tree) and each protocol. The fastest of them
is taken. Left out are NVLink SHARP (NVLS), SHARP in the network, and the corrections for trees of medium size.

Must not know models, runs or torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tinytrain_dist.metrics.device_specs import REACHABLE_SHARE_OF_LINKS, DeviceSpec

MICROSECOND = 1e-6
MIN_NVLINK = 100e9  # bytes/s: a device with slower links to the other devices of its node has PCIe
PLATEAU = 1.4  # NCCL's factor for the latency of a ring of large messages between nodes


@dataclass(frozen=True)
class Protocol:
    """A protocol of NCCL: latencies in microseconds, and the share of the bandwidth that data gets.

    Latencies are those of a start (base), and of a hop over NVLink, over PCIe and to another node. `max_bandwidth`:
    bytes/s by number of nodes (1, 2, more), those of a Hopper GPU.
    """

    ring: tuple[float, float, float, float]
    tree: tuple[float, float, float, float]
    ring_share: float
    tree_share: float
    max_bandwidth: tuple[float, float, float] = (math.inf, math.inf, math.inf)


PROTOCOLS = (
    Protocol((6.6, 0.6, 1.0, 2.7), (6.8, 0.6, 1.0, 5.0), 0.5, 0.92 / 3.8, (141e9, 45e9, 35e9)),  # LL
    Protocol((14.0, 1.9, 2.5, 4.0), (14.0, 1.25, 1.9, 8.5), 0.92, 0.92 * 0.92),  # LL128
    Protocol((8.4, 3.4, 5.7, 14.0), (8.4, 4.0, 4.0, 14.0), 1.0, 0.92),  # Simple
)
SIMPLE = PROTOCOLS[-1]


@dataclass(frozen=True)
class RankGroup:
    """Where the ranks of a group are: how many they are, how many of them share a node, and that node's devices."""

    ranks: int
    on_node: int
    devices_per_node: int

    @property
    def nodes(self) -> int:
        """Number of nodes with ranks of the group."""
        return math.ceil(self.ranks / self.on_node)

    def bandwidth(self, device: DeviceSpec) -> float:
        """Return the bytes/s that a ring through all ranks reaches: that of its slowest link.

        The groups of a node share its network, so a group gets the part of its ranks.
        """
        inside = device.neighbours if self.on_node > 1 else math.inf
        across = device.network * self.on_node / self.devices_per_node if self.nodes > 1 else math.inf
        return REACHABLE_SHARE_OF_LINKS * min(inside, across)


@dataclass(frozen=True)
class CollectiveTime:
    """Seconds before the first byte and for all bytes, if nothing else uses the link."""

    latency: float
    transfer: float

    @property
    def seconds(self) -> float:
        """Seconds from start to end."""
        return self.latency + self.transfer


def gather_time(nbytes: float, group: RankGroup, device: DeviceSpec) -> CollectiveTime:
    """Return the time of an all-gather of `nbytes` in total, or of a reduce-scatter of so many bytes on each rank."""
    return _fastest([_ring(protocol, 1, nbytes, group, device) for protocol in PROTOCOLS], group)


def all_to_all_time(nbytes: float, group: RankGroup, device: DeviceSpec) -> CollectiveTime:
    """Return the time in which each rank sends equal parts of `nbytes` to all ranks, itself included.

    Parts for other nodes cross the network, of which each device of a node has an equal share, while the others stay
    inside.
    """
    as_ring = gather_time(nbytes, group, device)
    if group.nodes == 1:
        return as_ring
    inside = (group.on_node - 1) / group.ranks * nbytes / device.neighbours
    across = (group.ranks - group.on_node) / group.ranks * nbytes / (device.network / group.devices_per_node)
    return CollectiveTime(as_ring.latency, max(inside, across) / REACHABLE_SHARE_OF_LINKS)


def all_reduce_time(nbytes: float, group: RankGroup, device: DeviceSpec) -> CollectiveTime:
    """Return the time of an all-reduce of `nbytes`."""
    rings = [_ring(protocol, 2, nbytes, group, device) for protocol in PROTOCOLS]
    return _fastest(rings + [_tree(protocol, nbytes, group, device) for protocol in PROTOCOLS], group)


def _fastest(times: list[CollectiveTime], group: RankGroup) -> CollectiveTime:
    return min(times, key=lambda time: time.seconds) if group.ranks > 1 else CollectiveTime(0.0, 0.0)


def _ring(protocol: Protocol, rounds: int, nbytes: float, group: RankGroup, device: DeviceSpec) -> CollectiveTime:
    """Return the time of `rounds` rounds through a ring: one for a gather, two for an all-reduce."""
    base, inside, across = _latencies(protocol.ring, device)
    if group.on_node == 1:  # then no other hop hides the latency of the network, and NCCL takes that of a tree
        across = protocol.tree[3]
    hops_across = rounds * (group.nodes - 1)
    hops_inside = rounds * (group.ranks - 1) - hops_across
    latency = base + hops_inside * inside + hops_across * across
    if protocol is SIMPLE and rounds == 2 and group.nodes > 1:
        latency *= PLATEAU
    sent = rounds * nbytes * (group.ranks - 1) / max(1, group.ranks)
    bandwidth = min(protocol.ring_share * group.bandwidth(device), _max_bandwidth(protocol, group))
    return CollectiveTime(latency * MICROSECOND, sent / bandwidth)


def _tree(protocol: Protocol, nbytes: float, group: RankGroup, device: DeviceSpec) -> CollectiveTime:
    """Return the time of an all-reduce along a double tree over nodes, with a chain inside each node."""
    base, inside, across = _latencies(protocol.tree, device)
    latency = base + 2 * ((group.on_node - 1) * inside + int(math.log2(max(1, group.nodes))) * across)
    bandwidth = min(protocol.tree_share * group.bandwidth(device), _max_bandwidth(protocol, group))
    return CollectiveTime(latency * MICROSECOND, 2 * nbytes / bandwidth)


def _latencies(row: tuple[float, float, float, float], device: DeviceSpec) -> tuple[float, float, float]:
    base, nvlink, pcie, network = row
    return base, nvlink if device.neighbours >= MIN_NVLINK else pcie, network


def _max_bandwidth(protocol: Protocol, group: RankGroup) -> float:
    return protocol.max_bandwidth[min(group.nodes, 3) - 1]
