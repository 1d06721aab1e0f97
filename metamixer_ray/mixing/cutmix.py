"""CutMix (Yun et al., ICCV 2019, arXiv 1905.04899)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metamixer_ray.mixing.config import MixingConfig
from metamixer_ray.mixing.local_mixing import draw_local
from metamixer_ray.mixing.partners import random_partner
from metamixer_ray.mixing.plan import MixPlan


@dataclass(frozen=True)
class CutMix:
    """Pastes a box of a random other image into each, with ``local_probability`` per batch."""

    config: MixingConfig
    organised: bool = False

    def draw(self, rng: np.random.Generator, *, rows: int, height: int, width: int, stages: Sequence[int]) -> MixPlan:
        """See ``Mixer.draw``; ``stages`` is not used: CutMix happens at the input."""
        if rng.random() >= self.config.local_probability:
            return MixPlan(rows)
        partner = random_partner(rng, rows)
        local = draw_local(rng, partner, height=height, width=width, alpha=self.config.local_alpha)
        return MixPlan(rows, local=local)
