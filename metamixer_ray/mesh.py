"""The world as two axes: peers x replicas.

Ranks of one peer hold one network and average its gradients along ``replica``; ranks of one replica index see the
same images and exchange what their networks say along ``peer``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from metamixer_ray.errors import ConfigError

Labels = Mapping[str, str]


@dataclass(frozen=True)
class PeerMesh:
    """This rank's place in the mesh, and the process groups of its two axes."""

    peers: int
    replicas: int
    peer: int
    replica: int
    peers_by_rank: tuple[int, ...]
    """Which peer each member of ``peer_group`` is: torch numbers the members of a group by their ranks."""
    peer_group: dist.ProcessGroup | None
    """Ranks of the same replica index; None for a world of one peer."""
    replica_group: dist.ProcessGroup | None
    """Ranks of the same peer, ordered by replica; None with one replica."""


def seats(selectors: Sequence[Labels] | None, peers: int, replicas: int, node_labels: Sequence[Labels]) -> list[int]:
    """Which rank sits where: entry ``peer * replicas + replica`` is the rank that takes that seat.

    Ray Train numbers its ranks by node, whatever label selector each worker was placed by, so with selectors the
    seats are matched to the ranks again by the labels of the nodes they run on (a bipartite matching; without
    selectors rank r takes seat r, and the replicas of one peer share a node because ranks of a node adjoin).

    Args:
        selectors: per peer, the labels its node must have (``{}``: any node); None when no peer asks for any.
        node_labels: per rank, the labels of its node.

    Raises:
        ConfigError: when the nodes at hand cannot seat every peer.
    """
    world = peers * replicas
    if not selectors or not any(selectors):
        return list(range(world))
    fits = [
        [
            rank
            for rank in range(world)
            if all(node_labels[rank].get(k) == v for k, v in selectors[seat // replicas].items())
        ]
        for seat in range(world)
    ]
    taken: dict[int, int] = {}

    def place(seat: int, tried: set[int]) -> bool:
        for rank in fits[seat]:
            if rank not in tried:
                tried.add(rank)
                if rank not in taken or place(taken[rank], tried):
                    taken[rank] = seat
                    return True
        return False

    # Picky seats first, so that plain ones keep the order of the ranks.
    for seat in sorted(range(world), key=lambda s: len(fits[s])):
        if not place(seat, set()):
            raise ConfigError(
                f"--peer-labels: no worker is left on a node with {dict(selectors[seat // replicas])} "
                f"for peer {seat // replicas}"
            )
    rank_of = {seat: rank for rank, seat in taken.items()}
    # Seats of one peer are alike. torch numbers a group by rank, and its first member must be the first replica.
    return [
        rank
        for first in range(0, world, replicas)
        for rank in sorted(rank_of[seat] for seat in range(first, first + replicas))
    ]


def build_mesh(peers: int, replicas: int, device: torch.device, seating: Sequence[int]) -> PeerMesh:
    """The mesh of an initialised default process group of ``peers * replicas`` ranks.

    The exchange runs on the group's own backend: NCCL where every worker has a GPU to itself, else gloo.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if world != peers * replicas:
        raise ConfigError(f"{peers} peers x {replicas} replicas need {peers * replicas} workers, not {world}")
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    ranks = torch.tensor(list(seating), dtype=torch.int).view(peers, replicas)
    mesh = DeviceMesh(kind, ranks, mesh_dim_names=("peer", "replica"))
    peer, replica = divmod(list(seating).index(rank), replicas)
    column = ranks[:, replica].tolist()
    return PeerMesh(
        peers=peers,
        replicas=replicas,
        peer=peer,
        replica=replica,
        peers_by_rank=tuple(sorted(range(peers), key=column.__getitem__)),
        peer_group=mesh.get_group("peer") if peers > 1 else None,
        replica_group=mesh.get_group("replica") if replicas > 1 else None,
    )


def share_buffers(network: nn.Module, mesh: PeerMesh) -> None:
    """Give all replicas of a peer the first one's running statistics: each has those of its own slices, and a
    checkpoint holds the first one's."""
    if mesh.replica_group is not None:
        for buffer in network.buffers():
            dist.broadcast(buffer, group=mesh.replica_group, group_src=0)
