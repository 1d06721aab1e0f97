"""Whether a set is streamed or decoded once, and whether memory is enough for it."""

import psutil

from metamixer_ray.data.config import STREAM_ABOVE_GB, DataConfig
from metamixer_ray.data.decoding import open_image
from metamixer_ray.data.sources.base import Source
from metamixer_ray.data.sources.parquet import first_image, survey
from metamixer_ray.data.streaming.feed import READS_AT_A_TIME
from metamixer_ray.data.streaming.index import PartIndex
from metamixer_ray.errors import ConfigError, DataError

# Encoded images are hardly ever smaller than this share of the decoded ones.
_SMALLEST_SHARE = 1 / 64


def is_streamed(config: DataConfig, source: Source) -> bool:
    """What ``--streaming`` says, or for ``auto`` whether the decoded images would take more than 32 GB.

    The same on every node: it depends on the files alone. ``auto`` reads the files' footers, and without
    --image-size the first image's size.

    Raises:
        ConfigError: a source that cannot be streamed, or --image-size is missing.
        DataError: a file cannot be read.
    """
    if config.streaming == "no":
        return False
    if source.parquet is None:
        if config.streaming == "yes":
            raise ConfigError(
                f"--streaming yes: only Parquet can be streamed, and --data {config.data} is none; write it as "
                "Parquet files with an image and a label column, or leave --streaming out"
            )
        return False
    if config.streaming == "yes":
        if config.image_size is None:
            raise ConfigError(
                "--streaming yes: streamed images are brought to a common size; give --image-size N, like 224"
            )
        return True
    files = [file for part in source.parquet.values() for file in part]
    limit = STREAM_ABOVE_GB * 1e9
    if config.image_size is None and sum(file.size for file in files) < limit * _SMALLEST_SHARE:
        return False
    images = sum(survey(part, config.image_column, config.label_column).rows for part in source.parquet.values())
    if config.image_size is not None:
        return 3 * images * config.image_size**2 > limit
    width, height = _first_size(config, source)
    if 3 * images * width * height > limit:
        raise ConfigError(
            f"--data {config.data}: {images} images of about {width} x {height} pixels would take "
            f"{3 * images * width * height / 1e9:.0f} GB decoded; give --image-size N, like 224, to stream them, or "
            "--streaming no to decode them all the same"
        )
    return False


def check_memory(index: PartIndex, window: int) -> int:
    """Bytes of encoded images that a worker may hold in training, from the mean size of an image.

    Raises:
        DataError: that is more than this node has, because row groups or --stream-window are too large.
    """
    largest = int(index.rows.max())
    images = min(max(window + window // 2, window + largest), len(index.labels))
    # Row groups that are being read are there twice: as stored and as decoded columns.
    held = images * int(index.bytes.sum()) // len(index.labels) + 2 * READS_AT_A_TIME * int(index.bytes.max())
    memory = psutil.virtual_memory().total
    if held > memory:
        raise DataError(
            f"{index.facts['where']}: with row groups of up to {largest} images a worker would hold "
            f"{held / 1e9:.1f} GB in memory, and this node has {memory / 1e9:.1f}; lower --stream-window {window}, or "
            "write the files with smaller row groups (100 images, say)"
        )
    return held


def _first_size(config: DataConfig, source: Source) -> tuple[int, int]:
    assert source.parquet is not None
    encoded = first_image(source.parquet["train"], config.image_column, config.label_column)
    try:
        with open_image(encoded) as image:
            return image.size
    except Exception:
        # Whoever decodes it says what is wrong with it.
        return 0, 0
