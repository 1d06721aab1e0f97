"""Where images can come from: one file per kind, one line here per name."""

import difflib
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from metamixer_ray.data.config import Augment, DataConfig
from metamixer_ray.data.sources.base import CHUNK_ROWS, Chunk, Part, Source, Split, array_chunks
from metamixer_ray.data.sources.digits import open_digits
from metamixer_ray.data.sources.folder import TEST_NAMES, open_folder
from metamixer_ray.data.sources.function import open_function
from metamixer_ray.data.sources.locations import SUFFIXES, is_uri
from metamixer_ray.data.sources.parquet import open_parquet
from metamixer_ray.data.sources.torchvision_sets import TORCHVISION_SETS, open_torchvision
from metamixer_ray.errors import ConfigError, Unreachable, UserError
from metamixer_ray.settings_text import brief


def _torchvision(name: str, config: DataConfig, cache_dir: Path) -> Source:
    return open_torchvision(name, data_root=config.data_root, cache_dir=cache_dir)


NAMED_SOURCES: dict[str, Callable[[DataConfig, Path], Source]] = {
    "digits": lambda config, cache_dir: open_digits(),
    **{name: partial(_torchvision, name) for name in TORCHVISION_SETS},
}

BY_PLACE = {
    "imagenet": "it is not downloaded, so say where it is: --data 'PLACE/train-*.parquet' --test-data "
    "'PLACE/validation-*.parquet' for the Hub's ILSVRC/imagenet-1k (whose test files have no labels), or --data FOLDER "
    "for one with train/ and val/"
}
"""Sets that are known by name but can't be fetched: what to do instead."""

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def open_source(config: DataConfig, cache_dir: Path, *, scored_only: bool = False) -> Source:
    """The source that ``config.data`` names: a known name, else ``module:function``, else a URI, file, folder
    or glob.

    A folder of Parquet files is recognised by what is in it; any other folder is a tree of class folders.
    Write ``./digits`` for a folder that bears a known name.

    Args:
        scored_only: nothing is to be trained on, so files and folders need no training part; both parts are then
            the test part, or all there is.

    Raises:
        ConfigError: nothing of that name, or options that don't belong together.
        DataError: a source that is there cannot be used.
        Unreachable: it can't be looked at.
    """
    try:
        return _open_source(config, cache_dir, scored_only=scored_only)
    except UserError:
        raise  # some are OSErrors, too
    except OSError as error:
        # To a worker, that saw the source when it was asked for, it is storage that may recover.
        raise Unreachable(f"--data {config.data}: {error.strerror or error} ({brief(error.filename)})") from error


def _open_source(config: DataConfig, cache_dir: Path, *, scored_only: bool) -> Source:
    data = config.data
    if data in NAMED_SOURCES:
        if config.test_data is not None:
            raise ConfigError(f"--test-data {config.test_data}: {data} has its own test part; leave --test-data out")
        return NAMED_SOURCES[data](config, cache_dir)
    if config.data_root is not None:
        raise ConfigError(
            f"--data-root belongs to the named sets ({', '.join(TORCHVISION_SETS)}), but --data is {data}"
        )
    if _FUNCTION.fullmatch(data):
        return open_function(data)
    path = Path(os.path.expanduser(data))
    if not is_uri(data) and path.is_dir() and not _holds_parquet(path):
        test = Path(os.path.expanduser(config.test_data)) if config.test_data is not None else None
        if test is not None and not test.is_dir():
            raise ConfigError(f"--test-data {config.test_data}: no such folder; --data is a tree of class folders")
        if scored_only:
            path = test = next((path / name for name in TEST_NAMES if (path / name).is_dir()), path)
        return open_folder(path, test_folder=test, follow_links=config.follow_links)
    if is_uri(data) or path.exists() or re.search(r"[*?\[]", data):
        return open_parquet(
            data,
            test_data=config.test_data,
            image_column=config.image_column,
            label_column=config.label_column,
            scored_only=scored_only,
        )
    if data in BY_PLACE:
        raise ConfigError(f"--data {data}: {BY_PLACE[data]}")
    known = ", ".join(NAMED_SOURCES)
    near = difflib.get_close_matches(data.lower(), NAMED_SOURCES, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"--data {data}: no such data set, file or folder.{hint} Names: {known}; or give a Parquet file, "
        "folder, glob or URI, a folder with train/ and test/ class folders, or module:function"
    )


def _holds_parquet(folder: Path, depth: int = 3) -> bool:
    """Whether a Parquet file lies in ``folder`` or up to ``depth`` folders below."""
    below = []
    for entry in os.scandir(folder):
        if entry.name.lower().endswith(SUFFIXES):
            return True
        if depth > 0 and entry.is_dir() and not entry.name.startswith("."):
            below.append(Path(entry.path))
    return any(_holds_parquet(path, depth - 1) for path in below)


def resolve_augment(config: DataConfig, *, streamed: bool) -> Augment:
    """How training images vary, once it is known what ``--augment auto`` means: resized crops for what is streamed, no
    mirroring where a mirror image means something else."""
    if config.augment != "auto":
        return config.augment
    if streamed:
        return "resized-crop"
    return "crop" if config.data in ("digits", "svhn") else "crop-flip"


__all__ = [
    "CHUNK_ROWS",
    "NAMED_SOURCES",
    "Chunk",
    "Part",
    "Source",
    "Split",
    "array_chunks",
    "open_source",
    "resolve_augment",
]
