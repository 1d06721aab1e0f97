"""The options of mixing; they become command-line flags and YAML keys."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from metamixer_ray.errors import ConfigError

MixerName = Literal["none", "mixup", "cutmix", "cutnmix", "resizemix", "manifold-mixup", "metamixer"]
Pairing = Literal["cross-class", "within-class", "free"]
MOST_CUTS = 16
"""More boxes would leave nothing to be seen of an image."""


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """How batches are mixed. A value that cannot work raises ``ConfigError`` naming the flag."""

    mixer: MixerName = "metamixer"
    """How a batch is mixed before and inside the networks; 'none' trains on plain images."""
    pairing: Pairing = "cross-class"
    """MetaMixer only: whom local mixing pairs. 'cross-class' cuts from the other class of the quadruple and
    interpolates within the class, 'within-class' the other way round, 'free' takes random rows for both."""
    local_alpha: float = 1.0
    """Beta(alpha, alpha) of local mixing (cutmix, cutnmix, metamixer): the kept area before a box is
    clipped."""
    global_alpha: float = 1.0
    """Beta(alpha, alpha) of global mixing (mixup, manifold-mixup, metamixer): the interpolation weight."""
    local_probability: float = 0.5
    """Probability that a batch is mixed locally (cutmix, cutnmix, resizemix, metamixer)."""
    global_probability: float = 0.5
    """Probability that a batch is mixed globally (mixup, manifold-mixup, metamixer)."""
    cuts: int = 2
    """Cut^nMix only: its n, the boxes that are pasted into each image, every one from another random image."""
    mix_together: bool = False
    """MetaMixer only: one coin decides on both kinds of mixing, with --local-probability for both (and
    --global-probability unused), instead of one independent coin for each."""
    mix_stages: tuple[int, ...] | None = None
    """Stages that global mixing picks from, uniformly per batch (manifold-mixup, metamixer): 0 is the input,
    k is before stage k+1. Default: every one that the networks have."""
    off_epochs: int = 0
    """The last epochs of a training that run unmixed."""

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for the first value that cannot work."""
        _check_choice("--mixer", self.mixer, get_args(MixerName))
        _check_choice("--pairing", self.pairing, get_args(Pairing))
        _check_alpha("--local-alpha", self.local_alpha)
        _check_alpha("--global-alpha", self.global_alpha)
        _check_probability("--local-probability", self.local_probability)
        _check_probability("--global-probability", self.global_probability)
        if not 1 <= self.cuts <= MOST_CUTS:
            raise ConfigError(f"--cuts must lie between 1 (as CutMix) and {MOST_CUTS}, got {self.cuts}")
        if self.off_epochs < 0:
            raise ConfigError(f"--off-epochs must be 0 or more, got {self.off_epochs}")
        if self.mix_stages is not None:
            _check_stages(self.mix_stages)


def resolve_stages(config: MixingConfig, available_stages: int) -> tuple[int, ...]:
    """The stages global mixing may pick from, for networks of ``available_stages`` stages (0 is the input).

    Raises ``ConfigError`` naming ``--mix-stages`` if a stage is asked for that the networks do not have.
    """
    if config.mix_stages is None:
        return tuple(range(available_stages))
    missing = [stage for stage in config.mix_stages if stage >= available_stages]
    if missing:
        raise ConfigError(
            f"--mix-stages asks for stage {missing[0]}, but the networks can be mixed only at stages 0 (the "
            f"input) to {available_stages - 1} (before the last stage); choose among these or leave it out"
        )
    return config.mix_stages


def _check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{flag} must be one of {', '.join(choices)}, got {value!r}")


def _check_alpha(flag: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{flag} must be a number above 0, got {value}; to mix nothing use --mixer none")


def _check_probability(flag: str, value: float) -> None:
    if not 0 <= value <= 1:  # also false for NaN
        raise ConfigError(f"{flag} must lie between 0 and 1, got {value}")


def _check_stages(stages: tuple[int, ...]) -> None:
    if not stages:
        raise ConfigError("--mix-stages is empty: name at least one stage (0 is the input) or leave it out for all")
    if min(stages) < 0:
        raise ConfigError(f"--mix-stages must be 0 (the input) or more, got {min(stages)}")
    if len(set(stages)) < len(stages):
        raise ConfigError(f"--mix-stages names a stage twice: {' '.join(map(str, stages))}; name each once")
