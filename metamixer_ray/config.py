"""The configuration of a training: each room owns its part, here they are joined into one tree.

The command line, the YAML files, MLflow's parameters and a sweep's spaces all speak of the same field names. Names
are unique across the tree, so a flag needs no prefix and a YAML file may be nested by room or flat.
"""

import difflib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from metamixer_ray.data import DataConfig
from metamixer_ray.distill import DistillConfig, needs_validation
from metamixer_ray.errors import ConfigError
from metamixer_ray.masking import is_masked, masked_uri
from metamixer_ray.mixing import MixingConfig
from metamixer_ray.networks import NetworkConfig
from metamixer_ray.optimisation import OptimisationConfig
from metamixer_ray.precision import Precision
from metamixer_ray.settings_text import brief, read_settings


def home() -> Path:
    """Where runs and the tracking store live by default: ``$METAMIXER_HOME``, else ``~/metamixer-ray``.

    Never the working directory: behind ``ray job submit`` that is a throw-away copy. And no name that Python could
    import: for a program that is started in the home folder it would stand before the package.
    """
    return Path(os.environ.get("METAMIXER_HOME") or Path.home() / "metamixer-ray")


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Where the workers run."""

    replicas: int = 1
    """Workers per peer: each holds the same network and takes its share of the batch."""
    gpus_per_worker: float | None = None
    """GPUs of one worker; below 1, workers share a GPU. Default: 1 where the cluster has GPUs, else 0."""
    cpus_per_worker: float | None = None
    """CPUs that Ray reserves for one worker; fractions allowed. Default: an even share of the cluster, at most 4."""
    threads: int | None = None
    """Threads that one worker computes with on a CPU. Default: its CPUs, at least 1."""
    peer_labels: tuple[str, ...] = ()
    """Node labels per peer, for example accelerator-type=A100 accelerator-type=T4; '-' for a peer without any."""
    spread: bool = False
    """Put workers on as many nodes as there are instead of on as few as hold them. Either way, of the places that Ray
    gives, replicas of one peer get those on one node."""
    address: str | None = None
    """Ray cluster to join. Default: $RAY_ADDRESS, the cluster a job was submitted to, or a new local one."""
    grows_to: tuple[str, ...] = ()
    """What the cluster's autoscaler may start, nodes x resources and labels of each: 8xGPU=1,CPU=4
    2xGPU=1,CPU=8,accelerator-type=T4. Ray doesn't tell. Default: $METAMIXER_GROWS_TO, or what the cluster launcher's
    file on the head node says."""
    max_failures: int = 100
    """How often the workers are restarted from the last checkpoint after one of them failed. Ten deaths in a row, or
    three errors that the code raises, without an epoch or a checkpoint in between end the run before; so do five deaths
    in a row while workers start."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run is kept and what it prints."""

    name: str | None = None
    """Name of the run and of its folder. Default: made of the peers, the mixer, the data and the time."""
    storage: str | None = None
    """Folder or URI (s3://, gs://, ...) that holds the run folders. Default: $METAMIXER_HOME/runs in your home."""
    resume: bool = False
    """Continue the run of --name, or the newest unfinished run of this very configuration."""
    resume_or_start: bool = False
    """The same where there is such a run, else start it: for a command that a scheduler repeats after a failure."""
    checkpoint_seconds: float = 300.0
    """Also checkpoint inside an epoch when so many seconds have passed since the last one, and before an evaluation of
    more than a few seconds; 0: at epoch ends only."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints are kept."""
    storage_patience: float = 1800.0
    """Seconds for which storage may refuse checkpoints and metrics (a full disk, an object store that answers with
    errors) before the training ends. Until then it goes on, and they are tried again."""
    tracking_uri: str | None = None
    """MLflow store or server. Default: $MLFLOW_TRACKING_URI, else SQLite in $METAMIXER_HOME."""
    experiment: str = "metamixer_ray"
    """MLflow experiment."""
    log_models: bool = True
    """Log each peer's network to MLflow as a model that predicts on raw uint8 images."""
    verbose: bool = False
    """Show Ray's and MLflow's own messages too."""


def is_folder_name(text: str) -> bool:
    """Whether ``text`` names a folder inside another one, in a path as in a URI, and can't lead out of it."""
    # Printable: neither a line break nor half a character, which no file system can write.
    return text.isprintable() and not set(text) & set("/\\?#%") and bool(text.strip(". ")) and len(text.encode()) <= 200


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train peer networks together: online knowledge distillation with MetaMixer on Ray."""

    peers: tuple[str, ...] = ("resnet14", "resnet8")
    """The networks that learn together, one name per peer: CIFAR-style families, torchvision's, or module:function."""
    epochs: int = 20
    """Passes over the training set."""
    batch_size: int = 128
    """Images per step that every peer sees, over all its replicas; a multiple of 4 x replicas for quadruples."""
    seed: int = 0
    """Decides initial weights, batches, augmentation and mixing."""
    precision: Precision = "auto"
    """auto: bf16 autocast where the hardware has it natively, float32 elsewhere. fp16 (for GPUs without bf16) scales
    the loss. Losses are always float32."""
    compile: bool = False
    """Compile each network with torch.compile. A bare nn.Sequential is compiled for unmixed batches only."""
    evaluate_every: int = 1
    """Evaluate after every so many epochs; after the last one always. (kdcl-general looks at its validation split after
    each epoch all the same.)"""
    test: bool = True
    """Score the test images after the last epoch. Without, only the validation split is looked at, as in a sweep."""
    baseline: bool = False
    """Also train the same networks alone (same weights, same batches, no mixing, no exchange) and report the gain."""
    dataset: DataConfig = field(default_factory=DataConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    distillation: DistillConfig = field(default_factory=DistillConfig)
    networks: NetworkConfig = field(default_factory=NetworkConfig)
    optimisation: OptimisationConfig = field(default_factory=OptimisationConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def workers(self) -> int:
        """Size of the world: peers x replicas."""
        return len(self.peers) * self.placement.replicas

    def check(self) -> None:
        """Refuse what can't work, before anything is started.

        Raises:
            ConfigError: names the option and a value that works.
        """
        refuse_masked(flatten(self))
        for name, value in flatten(self).items():
            if isinstance(value, str) and "\0" in value:
                raise ConfigError(f"{flag(name)} {brief(value)}: a NUL can't be in it")
        for name, least in (("epochs", 1), ("batch_size", 2), ("evaluate_every", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{flag(name)} must be at least {least}, it is {getattr(self, name)}")
        if not self.peers:
            raise ConfigError("--peers needs at least one network")
        for name, value, least in (
            ("checkpoint_seconds", self.run.checkpoint_seconds, 0),
            ("storage_patience", self.run.storage_patience, 0),
            ("max_failures", self.placement.max_failures, 0),
        ):
            if not value >= least:
                raise ConfigError(f"{flag(name)} must be at least {least}, it is {value}")
        if not self.test and not self.dataset.validation_fraction:
            raise ConfigError("--no-test needs a validation split to score instead: give --validation-fraction 0.1")
        if self.placement.replicas < 1:
            raise ConfigError(f"--replicas must be at least 1, it is {self.placement.replicas}")
        if self.run.keep_checkpoints < 1:
            raise ConfigError("--keep-checkpoints must be at least 1: without a checkpoint nothing can resume")
        self.distillation.check(len(self.peers))
        if needs_validation(self.distillation) and not self.dataset.validation_fraction:
            raise ConfigError(
                f"--distiller {self.distillation.distiller} weighs peers by their errors on a validation split, and "
                "there is none: give --validation-fraction 0.1"
            )
        if self.mixing.off_epochs >= self.epochs and self.mixing.mixer != "none":
            raise ConfigError(
                f"--off-epochs {self.mixing.off_epochs} leaves none of the {self.epochs} --epochs mixed; "
                "use --mixer none for that"
            )
        if self.distillation.kd_burn_in_epochs >= self.epochs and self.distillation.distiller != "none":
            raise ConfigError(
                f"--kd-burn-in-epochs {self.distillation.kd_burn_in_epochs} leaves none of the {self.epochs} --epochs "
                "for distillation; use --distiller none for that"
            )
        if (self.distillation.kd_warmup_epochs or 0) > self.epochs:
            raise ConfigError(
                f"--kd-warmup-epochs {self.distillation.kd_warmup_epochs} is longer than the {self.epochs} --epochs"
            )
        if self.placement.peer_labels and len(self.placement.peer_labels) != len(self.peers):
            raise ConfigError(
                f"--peer-labels has {len(self.placement.peer_labels)} values for {len(self.peers)} peers: "
                "give one each, '-' for a peer without any"
            )
        for name in ("gpus_per_worker", "cpus_per_worker"):
            value = getattr(self.placement, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{flag(name)} can't be {value}: give 0 or more")
        if self.placement.threads is not None and self.placement.threads < 1:
            raise ConfigError(f"--threads must be at least 1, it is {self.placement.threads}")
        if self.optimisation.lr_warmup_epochs > self.epochs:
            raise ConfigError(
                f"--lr-warmup-epochs {self.optimisation.lr_warmup_epochs} is longer than the {self.epochs} --epochs"
            )
        if self.run.name is not None and not is_folder_name(self.run.name):
            raise ConfigError(
                f"--name {brief(self.run.name)} can't name a folder in --storage; use letters, digits, '-' and '_', "
                "none of / \\ ? # %, and at most 200 bytes"
            )
        self.optimisation.check(len(self.peers))


def afresh(config: TrainConfig) -> TrainConfig:
    """What it takes to repeat a training: whether it was a resume, and under which name, is not part of it."""
    return replace(config, run=replace(config.run, name=None, resume=False, resume_or_start=False))


def flag(name: str) -> str:
    """The command-line flag of a field: ``batch_size`` -> ``--batch-size``."""
    return "--" + name.replace("_", "-")


def _leaves(kind: type) -> Iterator[tuple[str | None, str]]:
    for f in fields(kind):
        hint = get_type_hints(kind)[f.name]
        if is_dataclass(hint) and isinstance(hint, type):
            yield from ((f.name, leaf) for _, leaf in _leaves(hint))
        else:
            yield None, f.name


@cache
def sections() -> Mapping[str, str | None]:
    """Every field name of the tree and the section it stands in (None: the top)."""
    return MappingProxyType({leaf: section for section, leaf in _leaves(TrainConfig)})


def flatten(config: TrainConfig) -> dict[str, Any]:
    """All settings as one flat mapping of field name to value, in the order of the tree."""
    return {
        name: getattr(getattr(config, section) if section else config, name) for name, section in sections().items()
    }


def plain_settings(config: TrainConfig) -> dict[str, Any]:
    """The same with lists for tuples, as YAML and JSON have them."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in flatten(config).items()}


def with_settings(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """The configuration with some of its settings changed.

    Raises:
        ConfigError: an unknown name, a value of the wrong type, or settings that don't fit together.
    """
    return from_settings({**plain_settings(config), **settings})


def nest(settings: Mapping[str, Any], *, source: str = "configuration") -> dict[str, Any]:
    """Sort flat or nested settings into the tree's sections.

    Raises:
        ConfigError: an unknown name; the nearest valid one is suggested.
    """
    known = sections()
    rooms = {section for section in known.values() if section}
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        key = str(name).replace("-", "_")
        if key in rooms:
            if not isinstance(value, Mapping | None):
                raise ConfigError(f"{source}: {key!r} is a section of settings, not {brief(value)}")
            value = value or {}
            nested.setdefault(key, {}).update(nest(value, source=source).get(key, {}))
            strangers = [k for k in value if known.get(str(k).replace("-", "_")) != key]
            if strangers:
                raise ConfigError(f"{source}: {brief(strangers[0])} does not belong to section {key!r}")
        elif key in known:
            section = known[key]
            (nested.setdefault(section, {}) if section else nested)[key] = value
        else:
            near = difflib.get_close_matches(key, [*known, *rooms], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{source}: unknown setting {brief(name)}{hint}")
    return nested


def from_settings(settings: Mapping[str, Any], *, source: str = "configuration") -> TrainConfig:
    """A configuration from flat or nested settings; what is not named keeps its default.

    Raises:
        ConfigError: an unknown name or a value of the wrong type, named.
    """
    nested = _wrap_scalars(TrainConfig, nest(settings, source=source))
    try:
        return TypeAdapter(TrainConfig).validate_python(nested)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(own := first.get("ctx", {}).get("error"), ConfigError):
            raise ConfigError(f"{source}: {own}") from None
        where = next((str(part) for part in reversed(first["loc"]) if isinstance(part, str)), "?")
        raise ConfigError(f"{source}: {where}: {first['msg']} (it is {brief(first['input'])})") from None


def _wrap_scalars(kind: type, nested: dict[str, Any]) -> dict[str, Any]:
    """``lr: 0.1`` in a file means the same as ``lr: [0.1]``."""
    hints = get_type_hints(kind)
    wrapped: dict[str, Any] = {}
    for name, value in nested.items():
        hint = hints[name]
        if isinstance(value, Mapping) and is_dataclass(hint) and isinstance(hint, type):
            wrapped[name] = _wrap_scalars(hint, dict(value))
        elif "tuple" in str(hint) and value is not None and not isinstance(value, list | tuple):
            wrapped[name] = (value,)
        else:
            wrapped[name] = value
    return wrapped


def to_settings(config: TrainConfig) -> dict[str, Any]:
    """The tree as plain nested mappings and lists, ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return list(value) if isinstance(value, tuple) else value

    settings: dict[str, Any] = plain(config)
    return settings


def to_yaml(config: TrainConfig) -> str:
    """The configuration as YAML that ``--config`` takes; secrets in it are masked, see :func:`refuse_masked`."""
    # Escaped, since YAML takes some characters (such as U+0085) for line breaks.
    return yaml.safe_dump(_without_secrets(to_settings(config)), sort_keys=False, allow_unicode=False)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_secrets(inner) for name, inner in value.items()}
    return masked_uri(value) if isinstance(value, str) else value


def refuse_masked(settings: Mapping[str, Any]) -> None:
    """Refuse a place that was read from a file which didn't keep its keys.

    Raises:
        ConfigError: names the option that must be given again.
    """
    for name, value in settings.items():
        if isinstance(value, str) and is_masked(value):
            raise ConfigError(
                f"{flag(name)} {value} comes from a file, and files don't keep passwords and keys: give {flag(name)} "
                "again, or better a place without keys in it, and those in the environment ($AWS_ACCESS_KEY_ID, "
                "$MLFLOW_TRACKING_PASSWORD, ...)"
            )


def read_yaml(path: str | Path, *, source: str | None = None) -> TrainConfig:
    """Read a configuration from a YAML file.

    Args:
        source: how a message names the file. Default: as the value of ``--config``.

    Raises:
        ConfigError: no such file, not YAML, or settings that don't fit.
    """
    source = source or f"--config {path}"
    return from_settings(read_settings(path, source=source), source=source)


# What changes how a run is carried out but not what it computes.
_NOT_IDENTITY = frozenset(
    {
        *(f.name for f in fields(RunConfig)),
        *(f.name for f in fields(PlacementConfig) if f.name != "replicas"),
        *("loader_processes", "cache_dir", "data_root", "follow_links", "evaluate_every", "test", "baseline"),
    }
)


def identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the trained weights; a checkpoint fits only a run that agrees on all of them.

    The keys to the data are none of them.
    """
    decisive = {name: value for name, value in plain_settings(config).items() if name not in _NOT_IDENTITY}
    return {name: _without_secrets(value) for name, value in decisive.items()}


def completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved :func:`identity` with the options that are newer than it, at their defaults: with those everything is as
    it was before they were there."""
    return {**identity(TrainConfig()), **saved}
