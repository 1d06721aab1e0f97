"""The interface of distillers and their registry. A new family is one file and one line in
``_DISTILLERS``."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from metamixer_ray.distill.config import DistillConfig
from metamixer_ray.distill.dml import DeepMutualLearning
from metamixer_ray.distill.ensemble import EnsembleTeacher
from metamixer_ray.distill.heard import Heard, Reduce
from metamixer_ray.distill.independent import Independent
from metamixer_ray.distill.kdcl import LinearTeacher, MinLogitTeacher, NaiveTeacher
from metamixer_ray.distill.teaching import build_teaching
from metamixer_ray.errors import ConfigError


class Distiller(Protocol):
    """What a peer tells the others of its logits, and what it learns from theirs. Has no state and no
    parameters."""

    @property
    def reduce(self) -> Reduce:
        """What it needs of the others."""
        ...

    def say(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """What the others need of this peer's logits [B, C] (any float dtype), given the label weights ``targets``
        [B, C] of the mixed images: detached float32, named '<family>/<what>'."""
        ...

    def loss(self, logits: Tensor, targets: Tensor, heard: Heard) -> Tensor:
        """The distillation loss, a float32 scalar (mean over the batch, unweighted) whose gradient goes to
        ``logits`` [B, C] only; zero when there is no other peer. ``targets`` [B, C] are label weights, whose rows
        sum to one."""
        ...


_DISTILLERS: dict[str, Callable[[DistillConfig], Distiller]] = {
    "none": lambda config: Independent(),
    "dml": lambda config: DeepMutualLearning(config.temperature),
    "ensemble": lambda config: EnsembleTeacher(build_teaching(config)),
    "kdcl-naive": lambda config: NaiveTeacher(build_teaching(config)),
    "kdcl-linear": lambda config: LinearTeacher(build_teaching(config)),
    "kdcl-minlogit": lambda config: MinLogitTeacher(build_teaching(config)),
}


def distiller_names() -> tuple[str, ...]:
    """The names ``--distiller`` knows."""
    return tuple(_DISTILLERS)


def build_distiller(config: DistillConfig) -> Distiller:
    """The distiller that ``config.distiller`` names.

    Raises:
        ConfigError: no distiller has that name.
    """
    if config.distiller not in _DISTILLERS:
        raise ConfigError(f"--distiller {config.distiller!r} is not one of {', '.join(_DISTILLERS)}")
    return _DISTILLERS[config.distiller](config)
