"""A sweep on disk: naming a new one, finding the one to resume."""

import time
import uuid
from dataclasses import dataclass, fields, replace
from typing import Any

import yaml

from metamixer_ray.config import flag, flatten, identity
from metamixer_ray.data import NAMED_SOURCES
from metamixer_ray.errors import ConfigError
from metamixer_ray.folder import RunFolder
from metamixer_ray.runs import storage_of
from metamixer_ray.sweeps.config import DEFAULT_VALIDATION, SweepConfig

SWEEP, SUMMARY, BEST, SPACE = "sweep.yaml", "summary.json", "best.yaml", "space.txt"
TRIALS, CONFIRM, REFIT = "trials", "confirm", "refit"

# What may differ between the attempts of one sweep.
_FREE = frozenset({"samples", "max_concurrent", "trial_failures", "confirm_seeds", "refit", "first"})


@dataclass(frozen=True)
class Sweep:
    """One sweep's folder, and a key that no other sweep has."""

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
            run=replace(training.run, log_models=False, keep_checkpoints=1),
        ),
    )


def open_sweep(config: SweepConfig) -> Sweep:
    """A new sweep's folder, or with ``--resume`` one that is there; nothing is written, see :func:`create_sweep`.

    Raises:
        ConfigError: a name that is taken, nothing to resume, or options that differ from the sweep's.
    """
    storage, run = storage_of(config.training), config.training.run
    facts = sweep_facts(config)
    if not run.resume:
        folder = storage.inside(run.name or default_name(config))
        if folder.exists(SWEEP):
            raise ConfigError(
                f"--name {folder.name!r} is taken in {storage}: add --resume to continue it, or choose another name"
            )
        return Sweep(folder, uuid.uuid4().hex)
    names = [run.name] if run.name is not None else reversed(storage.children())
    for name in names:
        folder = storage.inside(name)
        theirs = _facts_of(folder)
        different = [key for key, value in facts.items() if key not in _FREE and theirs.get(key) != value]
        if theirs and not different and (run.name is not None or not folder.exists(SUMMARY)):
            return Sweep(folder, theirs["key"])
        if theirs and run.name is not None:
            key = different[0]
            raise ConfigError(
                f"--resume: {flag(key)} is {facts[key]!r} but sweep {name!r} has {theirs.get(key)!r}; "
                "give the same options, or another --name"
            )
    what = f"no sweep {run.name!r}" if run.name is not None else "no unfinished sweep with these options"
    raise ConfigError(f"--resume: there is {what} in {storage}; leave --resume out to start anew")


def create_sweep(sweep: Sweep, config: SweepConfig) -> None:
    """Make a new sweep's folder, or note the options that a resumed one goes on with."""
    sweep.folder.create()
    sweep.folder.write(SWEEP, yaml.safe_dump({"key": sweep.key, **sweep_facts(config)}, sort_keys=False))


def _facts_of(folder: RunFolder) -> dict[str, Any]:
    try:
        facts = yaml.safe_load(folder.read(SWEEP) or b"")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder}/{SWEEP} is not YAML ({error}); choose another --name") from None
    return facts if isinstance(facts, dict) else {}


def default_name(config: SweepConfig) -> str:
    """For example ``sweep-mixing-digits-20261122-134501``."""
    spaces = "-".join(name.rpartition("/")[2].removesuffix(".py").rpartition(".")[2] for name in config.space)
    data = config.training.dataset.data
    data = data if data in NAMED_SOURCES else data.rstrip("/").rpartition("/")[2].partition(".")[0]
    kept = "".join(c if c.isalnum() or c in "-_" else "_" for c in f"sweep-{spaces}-{data}")
    return f"{kept[:100]}-{time.strftime('%Y%m%d-%H%M%S')}"


def sweep_facts(config: SweepConfig) -> dict[str, Any]:
    """All options of a sweep, flat and plain; of the training what decides the weights, and its epochs."""
    own = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "training"}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
    flat = flatten(config.training)
    return {**plain, **identity(config.training), "evaluate_every": flat["evaluate_every"]}
