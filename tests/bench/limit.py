"""How near the whole training comes to a bare loop: forward, cross-entropy, backward, optimizer step, nothing else.

Both run in the same processes, in turn, so the bare loop has our threads, precision and memory settings too.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from metamixer_ray import distill, mixing
from metamixer_ray.config import TrainConfig
from metamixer_ray.data import normalise, train_batches
from metamixer_ray.meters import Meters
from metamixer_ray.networks import build_network
from metamixer_ray.optimisation import build_optimizer
from metamixer_ray.precision import autocast, resolve_precision
from tests.bench.drawing import drawn
from tests.bench.processes import Group, threads_each
from tests.bench.report import Row, compared, single
from tests.bench.training import CPU, Block, Ours, Timer, configured, slowest
from tests.bench.watching import Stopwatch

STEPS = 32
"""Of one block, which is an epoch, with what an epoch's end costs. Statistics are exchanged on one step in 16."""
SETTINGS: dict[str, Any] = {"peers": ["resnet32", "resnet32"], "batch_size": 128}

WATCHED = ("mixing", "exchange", "statistics", "data wait", "normalise", "metrics")


class Bare:
    """The limit: one peer's network, optimizer and precision on a fixed batch, with no data and no exchange."""

    def __init__(self, config: TrainConfig, *, classes: int, image_size: int) -> None:
        torch.manual_seed(0)
        network = build_network(config.peers[0], classes=classes, image_size=image_size, config=config.networks)
        self.network = network.to(memory_format=torch.channels_last).train()
        self.optimizer = build_optimizer(config.optimisation, 0, network)
        self.images = torch.randn(config.batch_size, 3, image_size, image_size)
        self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(0, classes, (config.batch_size,))
        self.precision = resolve_precision(config.precision, CPU)

    def block(self, steps: int) -> Block:
        """So many steps."""
        timer = Timer()
        for _ in range(steps):
            with autocast(self.precision, CPU):
                logits = self.network(self.images)
            loss = F.cross_entropy(logits.float(), self.labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        return timer.stop(steps=steps, images=steps * len(self.labels))


class Both:
    """A rank that runs either, in the same process."""

    def __init__(self, config: TrainConfig) -> None:
        self.training = Ours(config)
        splits = self.training.peer.splits
        self.loop = Bare(config, classes=len(splits.classes), image_size=splits.train.image_size)
        self.watch = Stopwatch()
        watch_steps(self.watch)

    def bare(self, steps: int) -> Block:
        dist.barrier()
        return self.loop.block(steps)

    def ours(self) -> tuple[Block, dict[str, float]]:
        """A block, and seconds by part of it."""
        self.watch.take()
        block = self.training.block()
        parts = self.watch.take()
        parts["wait for the others"] = self.training.cost().wait_seconds
        return block, parts


def watch_steps(watch: Stopwatch) -> None:
    """Have the parts of a step timed. What autograd does for them in the backward pass is not in these figures."""
    watch.time_everywhere("mixing", mixing.draw_plan, mixing.mix_images, mixing.mix_targets, mixing.mix_features)
    watch.time_everywhere(
        "statistics",
        distill.feature_statistics,
        distill.statistics_message,
        distill.statistics_loss,
        distill.attention_agreement,
    )
    watch.time_everywhere("normalise", normalise)
    watch.time_iteration("data wait", train_batches)
    for name, kind, method in (
        ("exchange", distill.Exchange, "start"),
        ("exchange", distill.Pending, "wait"),
        ("metrics", Meters, "add"),
    ):
        setattr(kind, method, watch.time(name, getattr(kind, method)))


def measure(rounds: int, settings: dict[str, Any] = SETTINGS, steps: int = STEPS, image_size: int = 32) -> list[Row]:
    """The section; ``settings`` of the training, of which a block runs ``steps``."""
    world = len(settings["peers"])
    data = drawn(train=steps * settings["batch_size"], size=image_size)
    config = configured(data=data, **settings)
    bare: list[list[Block]] = []
    ours: list[list[Block]] = []
    parts: list[list[dict[str, float]]] = []
    with Group(world, Both, config, threads=threads_each(world)) as group:
        for counted in range(-1, rounds):
            limit = group.call("bare", steps)
            whole = group.call("ours")
            if counted >= 0:
                bare.append(limit)
                ours.append([block for block, _ in whole])
                parts.append([part for _, part in whole])
    return rows_of(f"{world} x {settings['peers'][0]}, batch {settings['batch_size']}", bare, ours, parts)


def rows_of(
    what: str,
    bare: Sequence[Sequence[Block]],
    ours: Sequence[Sequence[Block]],
    parts: Sequence[Sequence[dict[str, float]]],
) -> list[Row]:
    """The table's lines from [round][rank]."""

    def cpu(blocks: Sequence[Block], kind: str) -> float:
        return 1e3 * sum(getattr(block, kind) for block in blocks) / sum(block.steps for block in blocks)

    rows = [
        compared(
            "limit",
            f"{what}: everything on",
            [slowest(blocks).speed for blocks in ours],
            "bare loop",
            [slowest(blocks).speed for blocks in bare],
            "images/s",
            wanted=">= 0.95",
        )
    ]
    for kind, whose in (
        ("cpu_seconds", "CPU time, all threads"),
        ("main_cpu_seconds", "CPU time, training thread"),
    ):
        rows.append(
            compared(
                "limit",
                f"{whose}, per peer and step",
                [cpu(blocks, kind) for blocks in ours],
                "bare loop",
                [cpu(blocks, kind) for blocks in bare],
                "ms",
            )
        )
    for name in (*WATCHED, "wait for the others"):
        label = "of exchange: wait for the others" if name == "wait for the others" else name
        shares = [
            100 * sum(part.get(name, 0.0) for part in of_round) / sum(block.seconds for block in blocks)
            for of_round, blocks in zip(parts, ours, strict=True)
        ]
        rows.append(single("limit", f"share of a step: {label}", shares, "%"))
    return rows
