"""What a user of the project brings along: a network and data sets of their own."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from metamixer_ray.config import home
from metamixer_ray.data import Batch

REST = "METAMIXER_TESTS_REST"
"""The variable that a ``leisurely`` network obeys."""
WAITING = 5
"""The training step (from 1) at which a ``patient`` network waits."""


def network(*, classes: int, image_size: int) -> nn.Module:
    """A small network with two stages and a head; nothing in it knows the project."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)),
    )


def fragile(*, classes: int, image_size: int) -> nn.Module:
    """A network whose logits are never finite from its eleventh training step on."""

    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network(classes=classes, image_size=image_size)
            self.stage_names = ("body.0", "body.1")
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.body(images)
            if not self.training:
                return logits
            self.steps.add_(1)
            return logits * float("nan") if self.steps.item() > 10 else logits

    return Fragile()


def breaks_later(*, classes: int, image_size: int) -> nn.Module:
    """A network that raises from its sixth step on, also after a restart."""

    class BreaksLater(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network(classes=classes, image_size=image_size)
            self.stage_names = ("body.0", "body.1")
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.steps.add_(1)
                if self.steps.item() > 5:
                    raise OSError("worn out")
            logits: torch.Tensor = self.body(images)
            return logits

    return BreaksLater()


def _barrier() -> Path:
    return home() / "patience"


@contextmanager
def patience() -> Iterator[None]:
    """Within this context, in whatever process they are, patient networks wait."""
    _barrier().touch()
    try:
        yield
    finally:
        _barrier().unlink()


def leisurely(*, classes: int, image_size: int) -> nn.Module:
    """A small network with BatchNorm that rests for so many seconds at each training step as the environment says."""

    class Leisurely(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.BatchNorm2d(3), *network(classes=classes, image_size=image_size).children())
            self.stage_names = ("body.1", "body.2")

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.training:
                time.sleep(float(os.environ[REST]))
            logits: torch.Tensor = self.body(images)
            return logits

    return Leisurely()


def patient(*, classes: int, image_size: int) -> nn.Module:
    """The small network, which waits at step ``WAITING``, without using the processor, where patience is asked for."""

    class Patient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network(classes=classes, image_size=image_size)
            self.stage_names = ("body.0", "body.1")
            self.steps = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.steps += 1
                while self.steps == WAITING and _barrier().exists():
                    time.sleep(0.1)
            logits: torch.Tensor = self.body(images)
            return logits

    return Patient()


def tells_where(*, classes: int, image_size: int) -> nn.Module:
    """The small network; while it trains, a buffer of it takes the letter of the label ``kind`` of its node."""
    import ray

    class TellsWhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network(classes=classes, image_size=image_size)
            self.stage_names = ("body.0", "body.1")
            self.register_buffer("node", torch.zeros((), dtype=torch.int64))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.training and ray.is_initialized():
                kind = ray.get_runtime_context().get_node_labels()["kind"]
                self.node.fill_(ord(kind[-1]))
            logits: torch.Tensor = self.body(images)
            return logits

    return TellsWhere()


def stripes() -> tuple[np.ndarray, list[int], np.ndarray, list[int]]:
    """Grey images of 16 x 16 with horizontal, vertical or diagonal stripes: 48 to train on, 12 to test on."""
    rng = np.random.default_rng(0)
    row, column = np.mgrid[0:16, 0:16]
    patterns = [row, column, row + column]
    labels = [i % 3 for i in range(60)]
    phase = rng.integers(0, 8, 60)
    images = np.stack([((patterns[c] + p) // 2 % 2 * 255).astype(np.uint8) for c, p in zip(labels, phase, strict=True)])
    images = images[..., None]
    return images[:48], labels[:48], images[48:], labels[48:]


def one_class() -> tuple[np.ndarray, list[int], np.ndarray, list[int]]:
    """A set with nothing to tell apart."""
    images, labels, test_images, test_labels = stripes()
    return images, [0] * len(labels), test_images, [0] * len(test_labels)


def unhurried(*, classes: int, image_size: int) -> nn.Module:
    """The small network, which takes its time with each step, so that something can happen meanwhile, and counts it."""

    class Unhurried(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network(classes=classes, image_size=image_size)
            self.stage_names = ("body.0", "body.1")

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.training:
                time.sleep(0.25)
                with (home() / "steps").open("ab") as file:
                    file.write(b".")
            logits: torch.Tensor = self.body(images)
            return logits

    return Unhurried()


def hurry() -> Path:
    """Have a worker with a ``hasty`` network leave the loop a batch early, once; then the returned file is gone."""
    path = home() / "haste"
    path.touch()
    return path


def hasty(*, classes: int, image_size: int) -> nn.Module:
    """A small network with BatchNorm, as the second of two peers, whose worker leaves the loop early when it is told to
    ``hurry``."""
    from ray.train import get_context

    from metamixer_ray import worker

    every = worker.train_batches

    def maybe_fewer(*args: Any, **options: Any) -> Iterator[Batch]:
        coming = every(*args, **options)
        # Every worker builds the networks of all peers, to see which stages they have in common.
        if get_context().get_world_rank() != 1:
            return coming
        try:
            (home() / "haste").unlink()
        except FileNotFoundError:
            return coming
        return (batch for batch, _ in pairwise(coming))

    # Where this is the driver, or whoever else only counts parameters, nothing is trained.
    worker.train_batches = maybe_fewer
    return nn.Sequential(nn.BatchNorm2d(3), *network(classes=classes, image_size=image_size).children())


def steps_taken() -> int:
    """How many training steps ``unhurried`` networks took, in whatever process they are."""
    path = home() / "steps"
    return path.stat().st_size if path.exists() else 0
