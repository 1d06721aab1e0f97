"""A trained run, opened again: its networks with their last weights, and the images to look at them with."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from metamixer_ray.config import TrainConfig, refuse_masked
from metamixer_ray.data import DataConfig, ImageSet, load_splits
from metamixer_ray.errors import ConfigError, DataError
from metamixer_ray.folder import RunFolder
from metamixer_ray.masking import masked_uri
from metamixer_ray.networks import StagedNetwork
from metamixer_ray.preparation import build_peers
from metamixer_ray.reporting import peer_names
from metamixer_ray.restoring import load_trained
from metamixer_ray.runs import read_config, read_facts, storage_of


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Which run, and which images if not its own."""

    run: Annotated[str, tyro.conf.Positional]
    """The run: its folder or URI, or its name in the default storage."""
    data: str | None = None
    """Other data, named like --data in training: its test part, or all of it where no part is named so. Default: the
    run's."""
    image_column: str | None = None
    """Parquet column with the images; found by its type when there is only one."""
    label_column: str | None = None
    """Parquet column with the integer labels; found by its type when there is only one."""
    data_root: str | None = None
    """Folder that already holds a named torchvision set."""
    follow_links: bool = False
    """In a tree of class folders, whether links may lead out of the folder that --data names."""

    def dataset(self, image_size: int) -> DataConfig | None:
        """The other data, brought to the size that the networks were trained on; None for the run's own.

        Raises:
            ConfigError: how it is to be read without what it is.
        """
        if self.data is None:
            for name in ("image_column", "label_column", "data_root"):
                if getattr(self, name) is not None:
                    option = f"--{name.replace('_', '-')}"
                    raise ConfigError(f"{option} says how --data is to be read, and there is none: give --data too")
            return None
        return DataConfig(
            data=self.data,
            image_column=self.image_column,
            label_column=self.label_column,
            data_root=self.data_root,
            follow_links=self.follow_links,
            image_size=image_size,
        )


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """What it takes to use a run's networks.

    Attributes:
        networks: one per peer, on the CPU, with the weights of the newest checkpoint.
        images: what they are scored on.
        split: which those are, in words.
        mean, std: per channel, of images scaled to 0..1: how inputs were normalised in training.
        image_size: height and width in pixels.
    """

    config: TrainConfig
    networks: list[StagedNetwork]
    images: ImageSet
    split: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int

    @property
    def names(self) -> list[str]:
        """The peers' names, such as ``peer0-resnet14``."""
        return peer_names(self.config.peers)


def find_run(text: str) -> RunFolder:
    """The folder that ``text`` means: a path or URI, else a name in the default storage."""
    try:
        here = "://" in text or Path(os.path.expanduser(text)).exists()
    except OSError:  # it will say why once it is to be read
        here = True
    if here:
        return RunFolder(text, option="RUN")
    return storage_of(TrainConfig()).inside(text)


def open_trained(folder: RunFolder, options: RunOptions | None = None) -> TrainedRun:
    """Open the run in ``folder``.

    Args:
        options: which images, if not the run's own.

    Raises:
        UserError: no such run, no checkpoint, or data that doesn't fit.
    """
    with folder.to_be_read():
        config, facts = read_config(folder), read_facts(folder)
    if config is None or facts is None:
        raise ConfigError(
            f"there is no run in {folder}: give a run's folder, or its name in {storage_of(TrainConfig())}"
        )
    other = options.dataset(facts.image_size) if options else None
    if other is None:
        refuse_masked({"data": config.dataset.data, "test_data": config.dataset.test_data})
    splits = load_splits(other or config.dataset, scored_only=other is not None)
    if other is None and splits.fingerprint != facts.data_fingerprint:
        raise DataError(
            f"--data: the images of the run have changed since it was trained ({config.dataset.data}), so its scores "
            "would be others; give --data explicitly to score those that are there now"
        )
    if splits.classes != facts.classes:
        raise DataError(
            f"--data {other and other.data}: its classes are {', '.join(splits.classes)[:200]}; the run was trained on "
            f"{', '.join(facts.classes)[:200]}: give data with the same classes in the same order"
        )
    networks = build_peers(config, classes=len(facts.classes), image_size=facts.image_size)
    with folder.to_be_read():
        problems = load_trained(networks, folder, None)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    # What a sweep's trial must not see is not shown here either.
    images = splits.test if other else splits.watched(tested=config.test)
    own = config.dataset
    tested = images is splits.test
    named = f"{own.test_data if tested and own.test_data else own.data}, {'test' if tested else 'validation'} split"
    return TrainedRun(
        config=config,
        networks=networks,
        images=images,
        # Other data need not have a part of that name.
        split=masked_uri(other.data if other else named),
        classes=splits.classes,
        mean=facts.mean,
        std=facts.std,
        image_size=facts.image_size,
    )
