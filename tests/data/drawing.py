"""Small data sets drawn for the tests."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("ant", "bee", "cow")


def picture(number: int, size: int = 8, mode: str = "RGB") -> Image.Image:
    """A random image that depends on ``number`` only."""
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def pixels(number: int, size: int = 8) -> np.ndarray:
    """``picture(number)`` as the room stores it: uint8 [3, H, W]."""
    return np.asarray(picture(number, size)).transpose(2, 0, 1)


def hugging_face(names: Sequence[str] = CLASSES, label: str = "label", image: str = "image") -> dict[str, str]:
    features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": list(names)}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[Any],
    *,
    names: Sequence[str] | None = CLASSES,
    image: str = "image",
    label: str = "label",
    more: dict[str, Any] | None = None,
    row_group: int = 7,
) -> Path:
    """A Parquet file as the Hub writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    structs = [None if data is None else {"bytes": data, "path": None} for data in images]
    table = pa.table(
        {
            image: pa.array(structs, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            label: pa.array(labels, pa.int64()),
            **(more or {}),
        }
    )
    if names is not None:
        table = table.replace_schema_metadata(hugging_face(names, label, image))
    pq.write_table(table, path, row_group_size=row_group)
    return path


def drawn_set(folder: Path, *, train: int = 30, test: int = 12, size: int = 8, **options: Any) -> Path:
    """``folder`` with train.parquet and test.parquet; image i has label i % 3 and the pixels of ``picture(i)``.

    Test images are numbered from 1000.
    """
    for name, first, count in (("train", 0, train), ("test", 1000, test)):
        images = [encoded(picture(first + i, size)) for i in range(count)]
        write_parquet(folder / f"{name}.parquet", images, [i % 3 for i in range(count)], **options)
    return folder


def class_folders(root: Path, per_class: int, *, first: int = 0, size: int = 8, names: Sequence[str] = CLASSES) -> Path:
    """``root/CLASS/number.png``."""
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            picture(first + 10 * label + i, size).save(root / name / f"{i:03d}.png")
    return root
