"""What an epoch's end costs: evaluation, and what a checkpoint holds the training up for."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench import command
from tests.bench.drawing import drawn
from tests.bench.report import Row, single

TRAIN, TEST = 2560, 512
"""Images; test images are a fifth of the training images, as in CIFAR-10."""
PEERS = ("resnet32", "resnet32")


def measure(
    rounds: int, peers: tuple[str, ...] = PEERS, train: int = TRAIN, test: int = TEST, size: int = 32
) -> list[Row]:
    """The section: one run of the command, of ``rounds`` + 1 epochs, the first of which is not counted."""
    flags = [
        *("--data", drawn(train=train, test=test, size=size)),
        *("--peers", *peers),
        *("--epochs", str(rounds + 1)),
        "--no-log-models",
    ]
    with tempfile.TemporaryDirectory(prefix="mm-", dir="/tmp") as folder:
        _, marks = command.run(flags, Path(folder))
    epochs = [parts_of(marks, epoch) for epoch in range(1, rounds + 1)]
    steps, evaluation, report = ([epoch[part] for epoch in epochs] for part in ("steps", "evaluation", "report"))
    large = 50_000 / train
    return [
        single("epoch", f"{' and '.join(peers)}, {train:,} images: steps of an epoch", steps, "s"),
        single("epoch", f"evaluation on {test:,} images", evaluation, "s"),
        single("epoch", "held up by report and checkpoint", report, "s"),
        single("epoch", "share of an epoch: evaluation", shares(epochs, "evaluation", 1.0), "%"),
        single(
            "epoch",
            "share of an epoch of 50,000 images: report and checkpoint",
            shares(epochs, "report", large),
            "%",
        ),
    ]


def shares(epochs: list[dict[str, float]], part: str, larger: float) -> list[float]:
    """Percent of each epoch that goes into ``part``, if steps and evaluation took ``larger`` times as long."""
    scales = {"steps": larger, "evaluation": larger, "report": 1.0}
    totals = [sum(seconds * scales[name] for name, seconds in epoch.items()) for epoch in epochs]
    return [100 * epoch[part] * scales[part] / total for epoch, total in zip(epochs, totals, strict=True)]


def parts_of(marks: Sequence[Mapping[str, Any]], epoch: int) -> dict[str, float]:
    """Seconds of one epoch (from 0) on the first rank."""

    def nth(name: str) -> Mapping[str, Any]:
        return [mark for mark in marks if mark["rank"] == 0 and mark["name"] == name][epoch]

    def seconds(name: str) -> float:
        taken: float = nth(name)["ended"] - nth(name)["began"]
        return taken

    evaluation, report = seconds("evaluate_epoch"), seconds("report")
    return {"steps": seconds("train_epoch") - evaluation - report, "evaluation": evaluation, "report": report}
