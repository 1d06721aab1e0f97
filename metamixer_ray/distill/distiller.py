"""The interface of distillers and their registry. A new family is one file and one line in ``_DISTILLERS``; in
``_LEARNING`` when it has parameters of its own, in ``_MEASURING`` when it asks how good the peers are."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from metamixer_ray.distill.codistillation import Codistillation
from metamixer_ray.distill.config import PROJECTION_DIMS, DistillConfig
from metamixer_ray.distill.dml import DeepMutualLearning
from metamixer_ray.distill.ensemble import EnsembleTeacher
from metamixer_ray.distill.gated_ensemble import GatedEnsembleTeacher
from metamixer_ray.distill.heard import Heard, Reduce
from metamixer_ray.distill.independent import Independent
from metamixer_ray.distill.kdcl import LinearTeacher, MinLogitTeacher, NaiveTeacher
from metamixer_ray.distill.kdcl_general import GeneralTeacher
from metamixer_ray.distill.mcl import MutualContrast
from metamixer_ray.distill.okddip import Auxiliary, GroupLeader
from metamixer_ray.distill.own import Own
from metamixer_ray.distill.teaching import build_teaching
from metamixer_ray.errors import ConfigError


class Distiller(Protocol):
    """What a peer tells the others of its view of a batch, and what it learns from theirs.

    Keeps nothing from step to step. One that has parameters is an ``nn.Module`` (see :func:`learnt_by`) and is given
    the embeddings; its parameters are trained with the network's, and are no part of it. Buffers may change between
    epochs.
    """

    @property
    def reduce(self) -> Reduce:
        """What it needs of the others."""
        ...

    def say(self, own: Own) -> dict[str, Tensor]:
        """What the others need of this peer: detached float32, named '<family>/<what>'."""
        ...

    def loss(self, own: Own, heard: Heard) -> Tensor:
        """The distillation loss, a float32 scalar (mean over the batch, unweighted) whose gradient goes to what this
        peer has itself only; zero when there is no other peer."""
        ...


_DISTILLERS: dict[str, Callable[[DistillConfig], Distiller]] = {
    "none": lambda config: Independent(),
    "dml": lambda config: DeepMutualLearning(config.temperature),
    "ensemble": lambda config: EnsembleTeacher(build_teaching(config)),
    "kdcl-naive": lambda config: NaiveTeacher(build_teaching(config)),
    "kdcl-linear": lambda config: LinearTeacher(build_teaching(config)),
    "kdcl-minlogit": lambda config: MinLogitTeacher(build_teaching(config)),
    "codistillation": lambda config: Codistillation(build_teaching(config), config.temperature),
}

_LEARNING: dict[str, Callable[[DistillConfig, int, bool], Distiller]] = {
    "ensemble-gated": lambda config, width, leads: GatedEnsembleTeacher(build_teaching(config), width=width),
    "okddip": lambda config, width, leads: (
        GroupLeader(config.temperature, dim=_projection_dim(config))
        if leads
        else Auxiliary(config.temperature, width=width, dim=_projection_dim(config))
    ),
    "mcl": lambda config, width, leads: MutualContrast(config, width=width, dim=_projection_dim(config)),
}

_MEASURING: dict[str, Callable[[DistillConfig, int], Distiller]] = {
    "kdcl-general": lambda config, peers: GeneralTeacher(build_teaching(config), peers=peers),
}


def distiller_names() -> tuple[str, ...]:
    """The names ``--distiller`` knows."""
    return (*_DISTILLERS, *_LEARNING, *_MEASURING)


def build_distiller(config: DistillConfig, *, width: int = 1, leads: bool = False, peers: int = 2) -> Distiller:
    """The distiller that ``config.distiller`` names, its parameters (if any) drawn from torch's global generator.

    Args:
        width: numbers in an image's embedding.
        leads: whether it is for the last peer, which leads in some methods.
        peers: how many there are.

    Raises:
        ConfigError: no distiller has that name.
    """
    if config.distiller in _DISTILLERS:
        return _DISTILLERS[config.distiller](config)
    if config.distiller in _LEARNING:
        return _LEARNING[config.distiller](config, width, leads)
    if config.distiller in _MEASURING:
        return _MEASURING[config.distiller](config, peers)
    raise ConfigError(f"--distiller {config.distiller!r} is not one of {', '.join(distiller_names())}")


def takes_embedding(config: DistillConfig) -> bool:
    """Whether ``config.distiller`` learns something itself from the embeddings."""
    return config.distiller in _LEARNING


def takes_copies(config: DistillConfig) -> bool:
    """Whether ``config.distiller`` asks copies of the other peers' networks (:class:`StaleCopies`)."""
    return config.distiller == "codistillation"


def learnt_by(distiller: Distiller) -> nn.Module | None:
    """What ``distiller`` learns or measures itself, such as projections of embeddings; None for most."""
    return distiller if isinstance(distiller, nn.Module) else None


def _projection_dim(config: DistillConfig) -> int:
    return config.projection_dim or PROJECTION_DIMS[config.distiller]
