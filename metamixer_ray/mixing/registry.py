"""The mixers by name. A new one is a file, a line here, and its name in ``config.MixerName``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from metamixer_ray.mixing.config import MixerName, MixingConfig
from metamixer_ray.mixing.cutmix import CutMix
from metamixer_ray.mixing.cutnmix import CutNMix
from metamixer_ray.mixing.manifold_mixup import ManifoldMixup
from metamixer_ray.mixing.metamixer import MetaMixer
from metamixer_ray.mixing.mixup import MixUp
from metamixer_ray.mixing.plan import Mixer, MixPlan
from metamixer_ray.mixing.resizemix import ResizeMix


@dataclass(frozen=True)
class NoMixing:
    """Leaves every batch as it is."""

    config: MixingConfig
    organised: bool = False

    def draw(self, rng: np.random.Generator, *, rows: int, height: int, width: int, stages: Sequence[int]) -> MixPlan:
        """See ``Mixer.draw``: always the unmixed plan."""
        return MixPlan(rows)


MIXERS: dict[MixerName, Callable[[MixingConfig], Mixer]] = {
    "none": NoMixing,
    "mixup": MixUp,
    "cutmix": CutMix,
    "cutnmix": CutNMix,
    "resizemix": ResizeMix,
    "manifold-mixup": ManifoldMixup,
    "metamixer": MetaMixer,
}


def build_mixer(config: MixingConfig) -> Mixer:
    """The mixer that ``config.mixer`` names."""
    return MIXERS[config.mixer](config)
