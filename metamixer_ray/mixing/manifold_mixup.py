"""Manifold Mixup (Verma et al., ICML 2019, arXiv 1806.05236)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metamixer_ray.mixing.config import MixingConfig
from metamixer_ray.mixing.global_mixing import draw_global
from metamixer_ray.mixing.partners import random_partner
from metamixer_ray.mixing.plan import MixPlan


@dataclass(frozen=True)
class ManifoldMixup:
    """Interpolates each row with a random one at a random stage, with ``global_probability`` per batch."""

    config: MixingConfig
    organised: bool = False

    def draw(self, rng: np.random.Generator, *, rows: int, height: int, width: int, stages: Sequence[int]) -> MixPlan:
        """See ``Mixer.draw``; the stage is drawn per batch, uniformly from ``stages``."""
        if rng.random() >= self.config.global_probability:
            return MixPlan(rows)
        stage = stages[int(rng.integers(len(stages)))]
        partner = random_partner(rng, rows)
        return MixPlan(rows, glob=draw_global(rng, partner, stage=stage, alpha=self.config.global_alpha))
