"""Runs on disk: naming a new one, finding the one to resume, never touching another's."""

import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from metamixer_ray.claiming import claimed
from metamixer_ray.config import TrainConfig, afresh, from_settings, home, identity, to_yaml
from metamixer_ray.data import Splits
from metamixer_ray.data.config import LARGEST_SIDE, SMALLEST_SIDE
from metamixer_ray.errors import ConfigError, DataError, UserError
from metamixer_ray.folder import RunFolder
from metamixer_ray.masking import masked_uri
from metamixer_ray.settings_text import parse_settings
from metamixer_ray.tracking import Journal

CONFIG, METRICS, SUMMARY, RUN = "config.yaml", "metrics.jsonl", "summary.json", "run.json"
# Is there when MLflow has everything.
TRACKED = ".tracked"
STORAGE_VARIABLE = "METAMIXER_STORAGE"

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# What is read of a file that may come from anywhere.
Classes = Annotated[tuple[str, ...], Field(min_length=1)]
Means = Annotated[tuple[Finite, ...], Field(min_length=3, max_length=3)]
Spreads = Annotated[tuple[Positive, ...], Field(min_length=3, max_length=3)]
Side = Annotated[int, Field(ge=SMALLEST_SIDE, le=LARGEST_SIDE)]


@dataclass(frozen=True)
class Run:
    """One training's folder, and a key that no other training has."""

    folder: RunFolder
    key: str
    new: bool = False
    """Whether nothing of it is on disk yet, see :func:`create_run`."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name


def journal_of(folder: RunFolder) -> Journal:
    """The record of the run in a folder as it is now, also where nothing is recorded yet."""
    return Journal(folder.filesystem, folder.path(METRICS))


def storage_of(config: TrainConfig) -> RunFolder:
    """Where the run folders are: ``--storage``, $METAMIXER_STORAGE, or ``runs`` in the project's home."""
    return RunFolder(config.run.storage or os.environ.get(STORAGE_VARIABLE) or str(home() / "runs"))


def default_name(config: TrainConfig) -> str:
    """For example ``resnet14-resnet8-metamixer-dml-digits-20261122-134501``."""
    data = masked_uri(config.dataset.data).rstrip("/").rpartition("/")[2].partition(".")[0] or "data"
    words = [*config.peers, config.mixing.mixer, config.distillation.distiller, data]
    kept = "-".join("".join(c if c.isalnum() or c in "-_." else "_" for c in word) for word in words)
    return f"{kept[:100]}-{time.strftime('%Y%m%d-%H%M%S')}"


def open_run(config: TrainConfig) -> Run:
    """A new run, or with ``--resume`` (``--resume-or-start``: if possible) one that is there; nothing is written.

    Raises:
        ConfigError: a name that is taken, nothing to resume, settings that differ from the run's, or a run that
            another process trains.
    """
    storage = storage_of(config)
    if not (config.run.resume or config.run.resume_or_start):
        return _new(config, storage)
    folder = _newest_unfinished(config, storage) if config.run.name is None else storage.inside(config.run.name)
    theirs = None if folder is None else read_config(folder)
    if folder is None or theirs is None:
        if not config.run.resume:
            return _new(config, storage)
        if config.run.name is None:
            raise ConfigError(
                f"--resume: no unfinished run of this configuration in {storage}; "
                "name one with --name, or leave --resume out to start anew"
            )
        raise ConfigError(f"--resume: there is no run {config.run.name!r} in {storage}; --resume-or-start makes it")
    ours, saved = identity(config), identity(theirs)
    different = sorted(name for name in ours if ours[name] != saved[name])
    if different:
        name = different[0]
        raise ConfigError(
            f"--resume: {name} is {ours[name]!r} but run {folder.name!r} has {saved[name]!r}; "
            f"give the same settings, for example --config {folder}/{CONFIG} --name {folder.name} --resume"
        )
    with claimed(folder):
        pass  # Told before Ray is started; a run is claimed for good when it is trained.
    origin = folder.read_as(RUN, RunOrigin)
    return Run(folder, (origin and origin.key) or folder.name)


def read_config(folder: RunFolder) -> TrainConfig | None:
    """The configuration of the run in a folder; None when it holds no run.

    Raises:
        ConfigError: its settings are not those of this version.
    """
    content = folder.read(CONFIG)
    if content is None:
        return None
    source = f"{folder}/{CONFIG}"
    return from_settings(parse_settings(content, source=source), source=source)


@dataclass(frozen=True, kw_only=True)
class RunOrigin:
    """What ``run.json`` tells of the run itself: when it was begun, and its key."""

    created: str = ""
    key: str = ""


@dataclass(frozen=True, kw_only=True)
class RunImages:
    """What ``run.json`` tells of the images, where it does: those of the first versions don't."""

    data_fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class RunFacts(RunOrigin):
    """What ``run.json`` also tells of the data: all that it takes to use the trained networks on other images.

    Attributes:
        mean, std: per channel, of images scaled to 0..1.
        image_size: height and width in pixels.
    """

    classes: Classes
    mean: Means
    std: Spreads
    image_size: Side
    data_fingerprint: str


def read_facts(folder: RunFolder) -> RunFacts | None:
    """What a run's ``run.json`` tells; None when it holds no run.

    Raises:
        ConfigError: the file is not what :func:`write_run` wrote.
    """
    return folder.read_as(RUN, RunFacts)


def create_run(run: Run, config: TrainConfig, splits: Splits) -> None:
    """Make a new run's folder with its configuration, and what of its data the trained networks depend on.

    Raises:
        ConfigError: the storage can't be written, or another process has begun a run of that name meanwhile.
    """
    with claimed(run.folder):
        _check_free(run.folder)
        write_run(run.folder, config, {"key": run.key, **data_facts(splits)})


def check_images(folder: RunFolder, fingerprint: str) -> None:
    """See that the images are those that the run in a folder was started on; where there is no run yet, any are.

    Raises:
        DataError: they are others.
        ConfigError: ``run.json`` is not what :func:`write_run` wrote.
    """
    saved = folder.read_as(RUN, RunImages)
    if saved is not None and saved.data_fingerprint not in ("", fingerprint):
        raise DataError(
            f"--data: the images have changed since run {folder.name!r} was started ({folder}); put back those that "
            "were there then, or choose another --name to train on those that are there now"
        )


def data_facts(splits: Splits) -> dict[str, Any]:
    """What ``run.json`` tells of the data: all that it takes to use the trained networks on other images."""
    return {
        "classes": list(splits.classes),
        "mean": list(splits.mean),
        "std": list(splits.std),
        "image_size": splits.train.image_size,
        "data_fingerprint": splits.fingerprint,
    }


def write_run(folder: RunFolder, config: TrainConfig, facts: Mapping[str, Any]) -> None:
    """Make a run's folder of its configuration and the ``facts`` of its key and data.

    Raises:
        Unwritable: the storage can't be.
    """
    folder.create()
    with folder.to_be_written():
        folder.write_json(RUN, {"created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts})
        folder.write(CONFIG, to_yaml(afresh(config)))


def _new(config: TrainConfig, storage: RunFolder) -> Run:
    folder = storage.inside(config.run.name or default_name(config))
    if config.run.name is None and folder.exists(CONFIG):
        # Two runs of the same settings in the same second.
        folder = storage.inside(f"{folder.name}-{uuid.uuid4().hex[:6]}")
    _check_free(folder)
    return Run(folder, uuid.uuid4().hex, new=True)


def _check_free(folder: RunFolder) -> None:
    if folder.exists(CONFIG):
        raise ConfigError(
            f"--name {folder.name!r} is taken by {folder}: add --resume to continue that run, or choose another name"
        )


def _newest_unfinished(config: TrainConfig, storage: RunFolder) -> RunFolder | None:
    candidates = []
    for name in storage.children():
        folder = storage.inside(name)
        if folder.exists(TRACKED):
            continue
        try:
            theirs, origin = read_config(folder), folder.read_as(RUN, RunOrigin)
        except UserError:
            continue
        if theirs is not None and identity(theirs) == identity(config):
            candidates.append((origin.created if origin else "", name, folder))
    return max(candidates, key=lambda c: c[:2])[2] if candidates else None
