"""The world as two axes: peers x replicas.

Ranks of one peer hold one network and average its gradients along ``replica``; ranks of one replica index see the
same images and exchange what their networks say along ``peer``.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

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


@dataclass(frozen=True)
class Host:
    """The node that a rank runs on."""

    id: str
    labels: Labels = field(default_factory=dict)


def seats(selectors: Sequence[Labels] | None, peers: int, replicas: int, hosts: Sequence[Host]) -> list[int]:
    """Which rank sits where: entry ``peer * replicas + replica`` is the rank that takes that seat.

    Ray Train numbers its ranks by node, whatever label selector each worker was placed by. So the seats are matched
    to the ranks again. Replicas of one peer get seats on one node where a node holds them all: what they tell each
    other, gradients, is one to two orders of magnitude more than what peers do.

    Args:
        selectors: per peer, the labels its node must have (``{}``: any node); None when no peer asks for any.
        hosts: per rank, its node.

    Raises:
        ConfigError: when the nodes at hand cannot seat every peer.
    """
    world = peers * replicas
    wanted = selectors or [{}] * peers
    fits = np.array([[labels.items() <= host.labels.items() for host in hosts] for labels in wanted], dtype=bool)
    if (lost := _unseated(np.repeat(fits, replicas, axis=0))) is not None:
        peer = lost // replicas
        raise ConfigError(f"--peer-labels: no worker is left on a node with {dict(wanted[peer])} for peer {peer}")
    # Picky peers first, so that plain ones keep the order of the ranks.
    order = sorted(range(peers), key=lambda peer: int(fits[peer].sum()))
    free = list(range(world))
    taken: dict[int, list[int]] = {}
    for peer in order:
        others = [other for other in order if other not in taken and other != peer]
        for ranks in _together(free, hosts, fits[peer], replicas):
            left = [rank for rank in free if rank not in ranks]
            if _unseated(np.repeat(fits[np.ix_(others, left)], replicas, axis=0)) is None:
                taken[peer], free = ranks, left
                break
    apart = [peer for peer in order if peer not in taken]
    matched = _match(np.repeat(fits[np.ix_(apart, free)], replicas, axis=0))
    for at, peer in enumerate(apart):
        taken[peer] = [free[column] for column in matched[at * replicas : (at + 1) * replicas]]
    # Seats of one peer are alike. torch numbers a group by rank, and its first member must be the first replica.
    return [rank for peer in range(peers) for rank in sorted(taken[peer])]


def _unseated(fits: np.ndarray) -> int | None:
    """The first seat that finds no rank when as many as possible do; None when all do.

    Args:
        fits: bool [seats, ranks].
    """
    matched = _match(fits)
    return int(np.argmin(matched)) if (matched < 0).any() else None


def _match(fits: np.ndarray) -> np.ndarray:
    """Per seat a rank of its own that fits, -1 where there is none: int [seats]."""
    if not fits.size:
        return np.full(len(fits), -1)
    if fits.all() and fits.shape[0] <= fits.shape[1]:
        return np.arange(len(fits))
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    return np.asarray(maximum_bipartite_matching(csr_array(fits), perm_type="column"))


def _together(free: Sequence[int], hosts: Sequence[Host], fits: np.ndarray, replicas: int) -> Iterator[list[int]]:
    """The first ``replicas`` free ranks that fit, of each node that has so many."""
    by_node: dict[str, list[int]] = {}
    for rank in free:
        if fits[rank]:
            by_node.setdefault(hosts[rank].id, []).append(rank)
    yield from (ranks[:replicas] for ranks in by_node.values() if len(ranks) >= replicas)


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


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What every rank of a group (of all, by default) gave, by rank, as JSON gives it back.

    torch gathers objects, too, but pickled: whoever gets between the workers would run code in them.
    """
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(lengths, torch.tensor([len(text)], device=device), group=group)
    room = int(lengths.max())
    texts = torch.empty(len(lengths), room, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(texts.view(-1), F.pad(text, (0, room - len(text))), group=group)
    told = zip(texts.cpu(), lengths.tolist(), strict=True)
    return [json.loads(row[:length].numpy().tobytes()) for row, length in told]


def share_buffers(network: nn.Module, mesh: PeerMesh) -> None:
    """Give all replicas of a peer the first one's running statistics: each has those of its own slices, and a
    checkpoint holds the first one's."""
    if mesh.replica_group is not None:
        for buffer in network.buffers():
            dist.broadcast(buffer, group=mesh.replica_group, group_src=0)
