"""What collectives cost on rings of workers: bytes and seconds. Pure arithmetic; nothing is measured here."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Link:
    """The way of a message from one worker to another."""

    bandwidth: float
    """Bytes per second."""
    latency: float
    """Seconds that the shortest message takes."""

    def slower(self, factor: float) -> "Link":
        """A link on which everything takes ``factor`` times as long."""
        return Link(bandwidth=self.bandwidth / factor, latency=self.latency * factor)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes that hold equally many workers each (the last one maybe fewer), in the order of their ranks."""

    workers_per_node: int
    inside: Link
    """Between two workers of one node."""
    between: Link
    """From one node to another; all workers of the node share its bandwidth."""


def all_reduce_sent(members: int, size: float) -> float:
    """Bytes that each of ``members`` workers puts on the wire to reduce ``size`` bytes over a ring.

    2 (P-1) / P times the size: below twice the size, however many they are.
    """
    return 2 * (members - 1) / members * size


def all_gather_sent(members: int, size: float) -> float:
    """Bytes that each of ``members`` workers puts on the wire so that all have everyone's ``size`` bytes."""
    return (members - 1) * size


def all_reduce_seconds(members: int, size: float, link: Link) -> float:
    """Time of an all-reduce over a ring: 2 (P-1) hops, one after the other, and the bytes sent meanwhile."""
    return 2 * (members - 1) * link.latency + all_reduce_sent(members, size) / link.bandwidth


def all_gather_seconds(members: int, size: float, link: Link) -> float:
    """Time of an all-gather over a ring: P-1 hops, and the bytes sent meanwhile."""
    return (members - 1) * link.latency + all_gather_sent(members, size) / link.bandwidth


def peer_rings(peers: int, replicas: int) -> list[list[int]]:
    """The ranks of each replica index: the rings of the exchange."""
    return [[peer * replicas + replica for peer in range(peers)] for replica in range(replicas)]


def replica_rings(peers: int, replicas: int) -> list[list[int]]:
    """The ranks of each peer: the rings of the gradients."""
    return [[peer * replicas + replica for replica in range(replicas)] for peer in range(peers)]


def ring_link(rings: Sequence[Sequence[int]], cluster: Cluster) -> Link:
    """What one of ``rings`` has to itself when all of them run at once.

    A ring inside a node runs on the node's inside. Where rings leave nodes, they share the bandwidth of the node that
    most of them leave; each passes on from rank to rank, so replicas of one peer leave a node less often than
    peers of one replica index do.
    """
    leaving: dict[int, int] = {}
    for ring in rings:
        for rank, following in zip(ring, [*ring[1:], *ring[:1]], strict=True):
            node = rank // cluster.workers_per_node
            if node != following // cluster.workers_per_node:
                leaving[node] = leaving.get(node, 0) + 1
    if not leaving:
        return cluster.inside
    return Link(bandwidth=cluster.between.bandwidth / max(leaving.values()), latency=cluster.between.latency)


def largest_slowdown(compute: float, exchange: float, share: float) -> float:
    """How many times slower the network may get until the exchange takes ``share`` of a step.

    A step is taken as ``compute`` and exchange alone (seconds): gradients between replicas slow down too, and counting
    them would make the exchange look small. Below 1 it takes more already; infinite without an exchange.
    """
    return share / (1 - share) * compute / exchange if exchange > 0 else float("inf")
