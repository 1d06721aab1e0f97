"""Many trainings on disk, as a sweep or a comparison: naming a new one, finding the one to resume."""

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import yaml

from metamixer_ray.claiming import claimed
from metamixer_ray.config import TrainConfig, completed, flag, flatten, identity
from metamixer_ray.data import NAMED_SOURCES
from metamixer_ray.errors import ConfigError, DataError
from metamixer_ray.folder import RunFolder
from metamixer_ray.masking import masked_uri
from metamixer_ray.runs import storage_of
from metamixer_ray.settings_text import parse_settings
from metamixer_ray.sweeps.config import DEFAULT_VALIDATION, SweepConfig

SUMMARY, BEST, SPACE = "summary.json", "best.yaml", "space.txt"
TRIALS, CONFIRM, REFIT = "trials", "confirm", "refit"
IMAGES = "data_fingerprint"


@dataclass(frozen=True)
class Kind:
    """What many trainings are together."""

    noun: str
    """As a person calls it."""
    free: frozenset[str]
    """Its options that may differ between the attempts of one."""

    @property
    def facts(self) -> str:
        """The file in its folder that has all its options."""
        return f"{self.noun}.yaml"


SWEEP = Kind("sweep", frozenset({"samples", "max_concurrent", "trial_failures", "confirm_seeds", "refit", "first"}))
COMPARISON = Kind("comparison", frozenset({"methods", "seeds", "max_concurrent", "trial_failures"}))


@dataclass(frozen=True)
class Sweep:
    """The folder of a sweep or a comparison, and a key that no other has."""

    kind: Kind
    folder: RunFolder
    key: str

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name


def for_trials(config: SweepConfig) -> SweepConfig:
    """The sweep with its training as trials run it: with a validation split, all that is looked at, and no models."""
    training = config.training
    fraction = training.dataset.validation_fraction or DEFAULT_VALIDATION
    return replace(
        config,
        training=replace(
            training,
            test=False,
            dataset=replace(training.dataset, validation_fraction=fraction),
            run=replace(training.run, log_models=False),
        ),
    )


def open_sweep(kind: Kind, training: TrainConfig, facts: Mapping[str, Any], subject: str) -> Sweep:
    """A new one's folder, or with ``--resume`` (``--resume-or-start``: if possible) one that is there.

    Nothing is written, see :func:`create_sweep`.

    Args:
        facts: all its options, flat and plain, see :func:`facts_of`.
        subject: what it is about, for the name of one that is given none.

    Raises:
        ConfigError: a name that is taken, nothing to resume, or options that differ from those it has.
        DataError: its images have changed.
    """
    storage, run = storage_of(training), training.run
    new = storage.inside(run.name or default_name(kind, training, subject))
    if not (run.resume or run.resume_or_start):
        if new.exists(kind.facts):
            raise _taken(new)
        return Sweep(kind, new, uuid.uuid4().hex)
    names = [run.name] if run.name is not None else reversed(storage.children())
    for name in names:
        folder = storage.inside(name)
        theirs = _facts_of(kind, folder)
        # Those of the first versions don't tell of their images.
        theirs = {IMAGES: facts[IMAGES], **theirs} if theirs else theirs
        different = [key for key, value in facts.items() if key not in kind.free and theirs.get(key) != value]
        if theirs and not different and (run.name is not None or not folder.exists(SUMMARY)):
            return Sweep(kind, folder, str(theirs.get("key", folder.name)))
        if theirs and run.name is not None:
            key = different[0]
            if key == IMAGES:
                raise DataError(
                    f"--data: the images have changed since {kind.noun} {name!r} was started ({folder}); put back "
                    "those that were there then, or choose another --name"
                )
            raise ConfigError(
                f"--resume: {flag(key)} is {facts[key]!r} but {kind.noun} {name!r} has {theirs.get(key)!r}; "
                "give the same options, or another --name"
            )
    if not run.resume:
        return Sweep(kind, new, uuid.uuid4().hex)
    what = f"no {kind.noun} {run.name!r}" if run.name is not None else f"no unfinished {kind.noun} with these options"
    raise ConfigError(f"--resume: there is {what} in {storage}; leave --resume out to start anew")


def create_sweep(sweep: Sweep, facts: Mapping[str, Any]) -> None:
    """Make a new one's folder, or note the options that a resumed one goes on with.

    Raises:
        ConfigError: the folder can't be written, or another process has begun one of that name meanwhile.
    """
    with claimed(sweep.folder):
        if _facts_of(sweep.kind, sweep.folder).get("key", sweep.key) != sweep.key:
            raise _taken(sweep.folder)
        sweep.folder.create()
        sweep.folder.write(sweep.kind.facts, yaml.safe_dump({"key": sweep.key, **facts}, sort_keys=False))


def _taken(folder: RunFolder) -> ConfigError:
    return ConfigError(
        f"--name {folder.name!r} is taken by {folder}: add --resume to continue it, or choose another name"
    )


def _facts_of(kind: Kind, folder: RunFolder) -> dict[str, Any]:
    facts = parse_settings(folder.read(kind.facts) or b"", source=f"{folder}/{kind.facts}")
    return completed(facts) if facts else {}


def default_name(kind: Kind, training: TrainConfig, subject: str) -> str:
    """For example ``sweep-mixing-digits-20261122-134501``."""
    data = masked_uri(training.dataset.data)
    data = data if data in NAMED_SOURCES else data.rstrip("/").rpartition("/")[2].partition(".")[0]
    kept = "".join(c if c.isalnum() or c in "-_" else "_" for c in f"{kind.noun}-{subject}-{data}")
    return f"{kept[:100]}-{time.strftime('%Y%m%d-%H%M%S')}"


def facts_of(config: Any, images: str) -> dict[str, Any]:
    """All options of a sweep or a comparison, flat and plain; of its ``training`` what decides the weights, and its
    epochs; and the fingerprint of its ``images``."""
    own = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "training"}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
    flat = flatten(config.training)
    return {**plain, **identity(config.training), "evaluate_every": flat["evaluate_every"], IMAGES: images}
