"""ResizeMix (Qin, Fang, Zhang, Liu, Wang, Wang: "ResizeMix: Mixing Data with Preserved Object Information and True
Labels", arXiv 2012.11101, 2020).

A whole other image, scaled by tau ~ U(0.1, 0.8), is pasted at a random place, so that what is pasted always shows its
object; labels are weighed by area. One tau serves both sides, one per row here and one per batch there. The place is
uniform among those where the scaled image lies inside whole; reimplementations also let it hang over the border and
squeeze it into what is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metamixer_ray.mixing.config import MixingConfig
from metamixer_ray.mixing.local_mixing import local_mix
from metamixer_ray.mixing.partners import random_partner
from metamixer_ray.mixing.plan import MixPlan

SMALLEST, LARGEST = 0.1, 0.8
"""Bounds of tau, the paper's (section 4.1)."""


@dataclass(frozen=True)
class ResizeMix:
    """Pastes a random other image, scaled down, into each, with ``local_probability`` per batch."""

    config: MixingConfig
    organised: bool = False

    def draw(self, rng: np.random.Generator, *, rows: int, height: int, width: int, stages: Sequence[int]) -> MixPlan:
        """See ``Mixer.draw``; ``stages`` is not used: ResizeMix happens at the input."""
        if rng.random() >= self.config.local_probability:
            return MixPlan(rows)
        partner = random_partner(rng, rows)
        tau = rng.uniform(SMALLEST, LARGEST, size=rows)
        low_and_high = []
        for size in (height, width):
            side = np.maximum(np.rint(tau * size).astype(np.int64), 1)
            low = rng.integers(size - side + 1)
            low_and_high.append((low, low + side))
        (top, bottom), (left, right) = low_and_high
        boxes = np.stack((top, left, bottom, right), axis=1)
        return MixPlan(rows, local=local_mix(partner[None], boxes[None], height=height, width=width, resized=True))
