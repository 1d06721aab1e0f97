"""Trainings without Ray: a session that keeps checkpoints and reports in a folder, and the job that a rank runs."""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from metamixer_ray.config import TrainConfig
from metamixer_ray.errors import CheckpointError, DataError
from metamixer_ray.flags import Diverged, agree_on_images
from metamixer_ray.mesh import PeerMesh, build_mesh, gather_json
from metamixer_ray.worker import WriteCheckpoint, train_peer
from tests.spine import networks

T = TypeVar("T")
# What differs between two runs of the very same training: what clocks said.
TIMES = ("seconds", "elapsed", "images_per_second", "exchange")


class Stopped(Exception):
    """The session ended the training after a checkpoint, as a killed process would."""


class FolderSession:
    """A session over a local folder: checkpoints are its sub-folders, reports the lines of ``rank<n>.jsonl``."""

    def __init__(
        self,
        folder: Path,
        *,
        start: Sequence[str] | str | None = None,
        recorded: int = 0,
        stop_after: str | None = None,
        told_at: tuple[int, int] | None = None,
    ) -> None:
        self.folder, self.stop_after, self.told_at = folder, stop_after, told_at
        self.start = [start] if isinstance(start, str) else list(start or ())
        self.on_record = recorded
        self.at = (0, 0)
        folder.mkdir(parents=True, exist_ok=True)

    def persist(self, work: Callable[[], T], what: str) -> T:
        return work()

    def checkpoints(self) -> list[str]:
        return self.start

    def recorded(self) -> int:
        return self.on_record

    def fetch(self, name: str, peers: Sequence[int]) -> Path:
        return self.folder / name

    def stepped(self, epoch: int, step: int, steps: int) -> None:
        with (self.folder / f"rank{dist.get_rank()}.steps").open("a") as file:
            file.write(f"{epoch} {step} {steps}\n")
        self.at = (epoch, step)

    def told_to_stop(self) -> bool:
        # As on a cluster, where one rank is told and the others hear it from that one.
        return dist.get_rank() == 0 and self.told_at is not None and self.at >= self.told_at

    def report(self, metrics: dict[str, Any], write: WriteCheckpoint | None, name: str | None) -> None:
        with (self.folder / f"rank{dist.get_rank()}.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        if name is not None:
            place = self.folder / name
            place.mkdir(exist_ok=True)
            if write is not None:
                write(place)
        if name is not None and name == self.stop_after:
            dist.barrier()
            raise Stopped(name)


class Witness(TorchFunctionMode):
    """Listens to every cross-entropy with soft targets: what the targets and the logits were, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[Tensor] = []
        self.logits: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.cross_entropy:
            self.logits.append(args[0].detach().clone())
            self.targets.append(args[1].detach().clone())
        return func(*args, **(kwargs or {}))


@dataclass
class Outcome:
    """What one rank tells of a training."""

    peer: int
    replica: int
    reports: list[dict[str, Any]]
    ended: str
    images: list[str]
    targets: list[Tensor]
    logits: list[Tensor]

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """Its epoch reports without what the clock said, once per epoch, also those that a restart repeated."""
        rows = {r["epoch"]: r for told in self.reports for r in told.get("reports", [told]) if r["event"] == "epoch"}
        return [{k: v for k, v in rows[epoch].items() if k not in TIMES} for epoch in sorted(rows)]


def learn_together(
    config: TrainConfig,
    folder: Path,
    start: Sequence[str] | str | None = None,
    stop_after: str | None = None,
    seating: list[int] | None = None,
    witnessed: bool = True,
    told_at: tuple[int, int] | None = None,
    recorded: int = 0,
) -> Outcome:
    """The job of one rank: train its peer in ``folder``. Unwitnessed, it tells of no targets and logits.

    Args:
        start: the checkpoint that the session knows of, or several, newest first.
        recorded: how many epochs it has on record.
        told_at: epoch and step (from 1) after which the first rank is told to stop.
    """
    networks.SEEN.clear()
    mesh: PeerMesh = build_mesh(
        len(config.peers), config.placement.replicas, torch.device("cpu"), seating or list(range(config.workers))
    )
    ended = "finished"
    witness = Witness()
    with witness if witnessed else nullcontext():
        try:
            session = FolderSession(folder, start=start, recorded=recorded, stop_after=stop_after, told_at=told_at)
            train_peer(config, mesh, torch.device("cpu"), session)
        except Stopped:
            ended = "stopped"
        except Diverged as error:
            ended = f"diverged: {error}"
        except CheckpointError as error:
            ended = f"refused: {error}"
    told = folder / f"rank{dist.get_rank()}.jsonl"
    lines = told.read_text().splitlines() if told.exists() else []
    return Outcome(
        peer=mesh.peer,
        replica=mesh.replica,
        reports=[json.loads(line) for line in lines],
        ended=ended,
        images=list(networks.SEEN),
        targets=witness.targets,
        logits=witness.logits,
    )


def compiled_graphs() -> int:
    """The job of one rank: how many graphs its process has compiled so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def agreement_on_images(others: dict[int, str], expected: str | None = None) -> str:
    """The job of one rank: agree with all on fingerprints, this rank's being ``others[rank]``; what it is told."""
    try:
        agree_on_images(others.get(dist.get_rank(), "same"), dist.get_world_size(), expected)
    except DataError as error:
        return str(error)
    return ""


def told_by_all(values: list[Any]) -> list[Any]:
    """The job of one rank: what all give, of which each gives one."""
    return gather_json(values[dist.get_rank()])


def mesh_of(peers: int, replicas: int, seating: list[int]) -> dict[str, Any]:
    """The job of one rank: build a mesh and tell who else is in its groups."""
    mesh = build_mesh(peers, replicas, torch.device("cpu"), seating)
    rank = torch.tensor([dist.get_rank()])

    def others(group: dist.ProcessGroup | None) -> list[int] | None:
        if group is None:
            return None
        ranks = [torch.zeros_like(rank) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, rank, group=group)
        return [int(r) for r in ranks]

    return {
        "seat": (mesh.peer, mesh.replica),
        "peer_group": others(mesh.peer_group),
        "replica_group": others(mesh.replica_group),
    }
