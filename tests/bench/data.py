"""The loader alone against the field's usual one, and the memory of processes that share one decoded copy."""

import contextlib
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from metamixer_ray.data import BatchOrder, DataConfig, load_splits, normalise, train_batches
from tests.bench.drawing import draw, drawn
from tests.bench.processes import Group
from tests.bench.report import Row, compared

BATCH = 128
LOADER_PROCESSES = 2
SHARERS = 4
READ_AT_A_TIME = 128
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


class Photos(Dataset[tuple[Tensor, int]]):
    """A set as torchvision's CIFAR10 gives it: an image at a time, by way of PIL, with the usual transforms."""

    def __init__(self, rows: int, size: int) -> None:
        self.images, self.labels, _, _ = draw(rows, 0, size, 10)
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(size, padding=size // 8),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[row])), int(self.labels[row])


class Usual:
    """torchvision's transforms in a DataLoader, whose processes stay from one epoch to the next."""

    def __init__(self, rows: int, size: int) -> None:
        self.loader = DataLoader(
            Photos(rows, size), batch_size=BATCH, shuffle=True, num_workers=LOADER_PROCESSES, persistent_workers=True
        )
        self.epoch()

    def epoch(self) -> float:
        """Images per second."""
        began = time.perf_counter()
        seen = sum(len(labels) for _, labels in self.loader)
        return seen / (time.perf_counter() - began)


class Ours:
    """``train_batches`` with its one background thread, normalised, in the memory format that networks take."""

    def __init__(self, data: str) -> None:
        self.config = DataConfig(data=data)
        self.splits = load_splits(self.config)
        self.order = BatchOrder(self.splits.train.labels, batch_size=BATCH, replicas=1, quadruples=True, seed=0)
        self.epochs = 0

    def epoch(self) -> float:
        """Images per second."""
        began = time.perf_counter()
        seen = 0
        for batch in train_batches(
            self.splits.train, self.order, self.config, seed=0, epoch=self.epochs, replica=0, first_step=0
        ):
            images = normalise(batch.images, self.splits.mean, self.splits.std)
            seen += len(images.contiguous(memory_format=torch.channels_last))
        self.epochs += 1
        return seen / (time.perf_counter() - began)


class Sharer:
    """A worker that has opened the set, and may read all of it."""

    def __init__(self, data: str) -> None:
        self.images = load_splits(DataConfig(data=data)).train
        # What torch needs for reading must not count as images.
        noise = torch.zeros(READ_AT_A_TIME, *self.images.take(torch.arange(1)).shape[1:], dtype=torch.uint8)
        noise[torch.arange(READ_AT_A_TIME)].max()
        self.before = memory()

    def read(self) -> int:
        """The brightest of all pixels, so that every page was looked at."""
        rows = torch.arange(len(self.images))
        return max(int(self.images.take(part).max()) for part in rows.split(READ_AT_A_TIME))

    def grown(self) -> dict[str, int]:
        """Bytes of memory more than before reading: ``{"pss": ..., "rss": ...}``."""
        return {kind: now - self.before[kind] for kind, now in memory().items()}


def memory() -> dict[str, int]:
    """This process's proportional and resident set size in bytes. Linux only."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0].lower(): int(line.split()[1]) * 1024 for line in lines}
    return {"pss": sizes["pss"], "rss": sizes["rss"]}


def measure(rounds: int, images: int = 12_800, shared_images: int = 40_000) -> list[Row]:
    """The section: ``images`` per epoch of the loaders, ``shared_images`` in the set that processes share."""
    usual, ours = [], []
    data = drawn(train=images, test=20)
    with contextlib.ExitStack() as stack:
        their_group = stack.enter_context(Group(1, Usual, images, 32))
        our_group = stack.enter_context(Group(1, Ours, data))
        our_group.call("epoch")
        for _ in range(rounds):
            usual += their_group.call("epoch")
            ours += our_group.call("epoch")
    rows = [
        compared(
            "data",
            "loader alone, 32 px: train_batches, 1 thread, and normalise",
            ours,
            f"torchvision's transforms, DataLoader, {LOADER_PROCESSES} processes",
            usual,
            "images/s",
            wanted=">= 10",
        )
    ]
    return rows + share(shared_images)


def share(images: int) -> list[Row]:
    """The memory of processes that have each read the whole set, beside one copy of it."""
    data = drawn(train=images, test=20)
    size = images * 3 * 32 * 32
    load_splits(DataConfig(data=data))  # decoded once, as on a node
    with Group(SHARERS, Sharer, data) as group:
        group.call("read")
        grown = group.call("grown")
    mib = 2**20
    return [
        compared(
            "data",
            f"{SHARERS} processes have read all images: {label}",
            [sum(process[kind] for process in grown) / mib],
            "one decoded copy",
            [size / mib],
            "MiB",
            wanted=wanted,
        )
        for kind, label, wanted in (
            ("pss", "proportional set size, together", "about 1"),
            ("rss", "resident set size, together", ""),
        )
    ]
