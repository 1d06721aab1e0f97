"""What the bench trains on: images drawn at random, named so that every process draws the same, and a tiny network.

Nothing here takes longer or shorter for what the pixels show, so noise serves as well as photographs.
"""

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from torch import nn

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]


def drawn(*, train: int, test: int = 512, size: int = 32, classes: int = 10) -> str:
    """The value of ``--data`` for that many noise images of ``size`` pixels a side."""
    return f"{__name__}:train{train}_test{test}_size{size}_classes{classes}"


def __getattr__(name: str) -> Callable[[], Arrays]:
    # --data module:function takes no arguments, so they are in the function's name.
    match = re.fullmatch(r"train(\d+)_test(\d+)_size(\d+)_classes(\d+)", name)
    if match is None:
        raise AttributeError(name)
    train, test, size, classes = map(int, match.groups())
    return lambda: draw(train, test, size, classes)


def draw(train: int, test: int, size: int, classes: int) -> Arrays:
    """Images uint8 [N, size, size, 3] and labels int64 [N], for training and test.

    Labels come in couples, so that quadruples use each image once and every batch is full.

    Raises:
        ValueError: too few training images to show every class.
    """
    if train < 2 * classes:
        raise ValueError(f"{train} training images can't show {classes} classes twice each")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (train + test, size, size, 3), dtype=np.uint8)
    labels = np.arange(max(train, test)) // 2 % classes
    return images[:train], labels[:train], images[train:], labels[:test]


def tiny(*, classes: int) -> nn.Module:
    """Two stages and a head: so little to compute that what surrounds a step shows."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)),
    )


TINY = f"{__name__}:tiny"
"""The value of ``--peers`` for :func:`tiny`."""


def photographs(folder: Path, count: int, classes: int = 4) -> tuple[Path, Path]:
    """``count`` JPEGs of about 400 x 300 pixels: Parquet as the Hub serves it, and class folders of the same."""
    rng = np.random.default_rng(0)
    tree, rows, labels = folder / "tree", [], []
    for number in range(count):
        width, height = int(rng.integers(360, 441)), int(rng.integers(270, 331))
        # Smooth colours with some grain compress to about what a photograph does.
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "JPEG", quality=90)
        label = number // 2 % classes
        place = tree / f"class{label}" / f"{number:05d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded.getvalue())
        rows.append({"bytes": encoded.getvalue(), "path": None})
        labels.append(label)
    parquet = folder / "parquet"
    parquet.mkdir()
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"image": image, "label": pa.array(labels, pa.int64())})
    pq.write_table(table, parquet / "train.parquet", row_group_size=64)
    pq.write_table(table.slice(0, 8), parquet / "test.parquet")
    return parquet, tree
