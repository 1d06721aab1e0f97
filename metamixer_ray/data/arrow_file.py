"""One prepared split as an Arrow IPC file, written once and memory-mapped by every process of a node.

The file holds a single record batch of ``image`` (fixed-size binary, 3 x H x W bytes) and ``label`` (int64),
so all images are one contiguous stretch that a tensor can lie on without a copy.
"""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

_KEY = b"metamixer_ray"


@dataclass(frozen=True)
class MappedSplit:
    """A prepared split as it lies in the page cache.

    ``images`` is uint8 [N, 3, H, W] on read-only memory: writing to it crashes the process.
    """

    path: Path
    images: Tensor
    labels: Tensor
    facts: dict[str, Any]


def write_arrow(target: Path, raw: Path, shape: tuple[int, int, int], labels: NDArray[np.int64], facts: Any) -> None:
    """Turn ``raw``, the images' bytes one after another, into the Arrow file ``target``; durable when it
    returns.

    ``raw`` is mapped, not loaded, so the memory needed doesn't grow with the set.
    """
    width = int(np.prod(shape))
    with pa.memory_map(str(raw)) as source:
        images = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(labels), [None, source.read_buffer()])
        metadata = {_KEY: json.dumps({**facts, "shape": [len(labels), *shape]}).encode()}
        schema = pa.schema([("image", pa.binary(width)), ("label", pa.int64())], metadata=metadata)
        batch = pa.record_batch([images, pa.array(labels)], schema=schema)
        with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(batch)
        del images, batch
    with open(target, "rb+") as written:
        os.fsync(written.fileno())


def map_arrow(path: Path) -> MappedSplit:
    """Map a file that ``write_arrow`` wrote: no image byte is read or copied.

    Raises:
        FileNotFoundError: there is no such file.
        Exception: it isn't whole, or not such a file.
    """
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        facts = json.loads(reader.schema.metadata[_KEY])
        batch = reader.get_batch(0)
    # Sees that the lengths that the file tells fit its buffers, and no more: no image byte is looked at.
    batch.validate()
    count, channels, height, width = facts["shape"]
    if batch.num_rows != count:
        raise ValueError(f"{path}: {batch.num_rows} rows instead of {count}")
    flat = np.frombuffer(batch.column(0).buffers()[1], dtype=np.uint8)
    with warnings.catch_warnings():
        # torch warns that the memory is read-only, which is the point: nothing in this package writes to it.
        warnings.simplefilter("ignore", UserWarning)
        images = torch.from_numpy(flat)
    images = images[: count * channels * height * width].view(count, channels, height, width)
    labels = torch.from_numpy(batch.column(1).to_numpy(zero_copy_only=False).astype(np.int64))
    if count == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < len(facts["classes"]):
        raise ValueError(f"{path}: labels that aren't those of its classes")
    return MappedSplit(path, images, labels, facts)
