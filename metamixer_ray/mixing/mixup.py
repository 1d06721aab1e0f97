"""mixup (Zhang et al., ICLR 2018, arXiv 1710.09412)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metamixer_ray.mixing.config import MixingConfig
from metamixer_ray.mixing.global_mixing import draw_global
from metamixer_ray.mixing.partners import random_partner
from metamixer_ray.mixing.plan import MixPlan


@dataclass(frozen=True)
class MixUp:
    """Interpolates each image with a random other one, with ``global_probability`` per batch."""

    config: MixingConfig
    organised: bool = False

    def draw(self, rng: np.random.Generator, *, rows: int, height: int, width: int, stages: Sequence[int]) -> MixPlan:
        """See ``Mixer.draw``; ``stages`` is not used: mixup happens at the input."""
        if rng.random() >= self.config.global_probability:
            return MixPlan(rows)
        partner = random_partner(rng, rows)
        return MixPlan(rows, glob=draw_global(rng, partner, stage=0, alpha=self.config.global_alpha))
