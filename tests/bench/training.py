"""One rank of our training without Ray, run in blocks of one epoch each."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from metamixer_ray import worker
from metamixer_ray.allocation import keep_freed_memory
from metamixer_ray.checkpoint import Progress
from metamixer_ray.config import TrainConfig, from_settings
from metamixer_ray.data import load_splits
from metamixer_ray.distill import Distiller, ExchangeCost, Reduce
from metamixer_ray.mesh import PeerMesh

NEVER = 10**6

CPU = torch.device("cpu")


def configured(**settings: Any) -> TrainConfig:
    """A training of which only the steps are run: it never evaluates, and the distillation has its full weight."""
    steady = {"epochs": NEVER, "evaluate_every": NEVER, "kd_warmup_epochs": 0, "checkpoint_seconds": 0}
    config = from_settings({**steady, **settings})
    config.check()
    return config


class Silent:
    """A session that starts afresh and keeps nothing."""

    def checkpoints(self) -> list[str]:
        return []

    def recorded(self) -> int:
        return 0

    def fetch(self, name: str, peers: Sequence[int]) -> Path:
        raise AssertionError("there is nothing to fetch")

    def report(self, metrics: dict[str, Any], write: worker.WriteCheckpoint | None, name: str | None) -> None:
        pass

    def stepped(self, epoch: int, step: int, steps: int) -> None:
        pass

    def told_to_stop(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class Block:
    """What one block of steps took on one rank."""

    steps: int
    images: int
    """Rows that this rank's network saw."""
    seconds: float
    cpu_seconds: float
    """Of all threads of the process; waiting does not count."""
    main_cpu_seconds: float
    """Of the thread that trains, without those that prepare batches and carry messages."""

    @property
    def speed(self) -> float:
        """Images per second."""
        return self.images / self.seconds


class Timer:
    """Starts the three clocks of a :class:`Block`."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time(), time.thread_time()

    def stop(self, *, steps: int, images: int) -> Block:
        wall, cpu, main = self._began
        return Block(
            steps=steps,
            images=images,
            seconds=time.perf_counter() - wall,
            cpu_seconds=time.process_time() - cpu,
            main_cpu_seconds=time.thread_time() - main,
        )


class Ours:
    """One peer with everything on.

    Args:
        config: its peers are the first ranks of the default group; a single one is on every rank, alone.
        group: these ranks, where they are not all.
    """

    def __init__(self, config: TrainConfig, group: dist.ProcessGroup | None = None) -> None:
        keep_freed_memory()  # as every worker of ours does
        peers = len(config.peers)
        mesh = PeerMesh(
            peers=peers,
            replicas=1,
            peer=dist.get_rank() if peers > 1 else 0,
            replica=0,
            peers_by_rank=tuple(range(peers)),
            peer_group=(group or dist.group.WORLD) if peers > 1 else None,
            replica_group=None,
        )
        self.group = group
        self.peer = worker.set_up(config, mesh, CPU, load_splits(config.dataset))
        self._progress = Progress()

    def say_each(self) -> None:
        """Exchange each peer's own tensors from now on, by an all-gather."""
        self.peer = replace(self.peer, distiller=Each(self.peer.distiller))

    def block(self) -> Block:
        """Train for one epoch."""
        first = self._progress.total_steps
        dist.barrier(group=self.group)
        timer = Timer()
        worker.train_epoch(self.peer, self._progress, Silent())
        steps = self._progress.total_steps - first
        return timer.stop(steps=steps, images=len(self.peer.splits.train))

    def cost(self) -> ExchangeCost:
        """What the exchange cost in the last block."""
        return self.peer.exchange.cost()


class Each:
    """The same loss from each peer's own tensors: what an all-gather brings, reduced by every peer for itself."""

    reduce: Reduce = "each"

    def __init__(self, distiller: Distiller) -> None:
        self._distiller = distiller
        self.say, self.loss = distiller.say, distiller.loss


def slowest(blocks: Sequence[Block]) -> Block:
    """The block of the rank that all others wait for."""
    return max(blocks, key=lambda block: block.seconds)
