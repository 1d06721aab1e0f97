"""Streamed Parquet of JPEGs against torchvision's ImageFolder, at 224 pixels, with as many loader processes."""

import contextlib
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from metamixer_ray.config import from_settings
from metamixer_ray.data import load_splits, normalise, train_batches
from metamixer_ray.preparation import batch_order
from tests.bench.data import MEAN, STD
from tests.bench.drawing import photographs
from tests.bench.processes import Group
from tests.bench.report import Row, compared

BATCH = 64
SIZE = 224
LOADER_PROCESSES = 2
IMAGES = 1024


class Folder:
    """torchvision's ImageFolder, whose loader processes stay from one epoch to the next."""

    def __init__(self, tree: Path, size: int) -> None:
        transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )
        self.loader = DataLoader(
            datasets.ImageFolder(str(tree), transform),
            batch_size=BATCH,
            shuffle=True,
            num_workers=LOADER_PROCESSES,
            persistent_workers=True,
        )
        self.epoch()

    def epoch(self) -> float:
        """Images per second."""
        began = time.perf_counter()
        seen = sum(len(labels) for _, labels in self.loader)
        return seen / (time.perf_counter() - began)


class Streamed:
    """``train_batches`` of a streamed set in quadruples, normalised; its processes start anew with each epoch."""

    def __init__(self, parquet: Path, size: int) -> None:
        self.config = from_settings(
            {
                "data": str(parquet),
                "image_size": size,
                "streaming": "yes",
                "loader_processes": LOADER_PROCESSES,
                "batch_size": BATCH,
            }
        )
        self.splits = load_splits(self.config.dataset)
        self.order = batch_order(self.config, self.splits)
        self.epochs = 0

    def epoch(self) -> float:
        """Images per second."""
        began = time.perf_counter()
        seen = 0
        for batch in train_batches(
            self.splits.train, self.order, self.config.dataset, seed=0, epoch=self.epochs, replica=0
        ):
            images = normalise(batch.images, self.splits.mean, self.splits.std)
            seen += len(images.contiguous(memory_format=torch.channels_last))
        self.epochs += 1
        return seen / (time.perf_counter() - began)


def measure(rounds: int, count: int = IMAGES, size: int = SIZE) -> list[Row]:
    """The section, with ``count`` drawn JPEGs that are brought to ``size`` pixels a side."""
    ours: list[float] = []
    usual: list[float] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="metamixer_ray-bench-")))
        parquet, tree = photographs(folder, count)
        their_group = stack.enter_context(Group(1, Folder, tree, size))
        our_group = stack.enter_context(Group(1, Streamed, parquet, size))
        our_group.call("epoch")
        for _ in range(rounds):
            usual += their_group.call("epoch")
            ours += our_group.call("epoch")
    return [
        compared(
            "streaming",
            f"{count:,} JPEGs of about 400 x 300, at {size} px, {LOADER_PROCESSES} processes: streamed Parquet",
            ours,
            f"torchvision's ImageFolder, DataLoader, {LOADER_PROCESSES} processes",
            usual,
            "images/s",
            wanted=">= 1",
        )
    ]
