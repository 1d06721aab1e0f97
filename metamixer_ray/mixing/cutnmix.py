"""Cut^nMix (Shen, Xu, Yang, Li, Guo: "Mixed Sample Augmentation for Online Distillation", arXiv 2206.12370, 2022).

Published in what we could read (the abstract): a regulariser of mixed samples, stronger than CutMix and made for online
distillation. **Our reading**: CutMix n times (``--cuts``). Each time a box from a random image of the batch, drawn as
CutMix draws it, is pasted over what is there, and labels are weighed by the pixels that are seen of each image in the
end. n = 1 is CutMix. The paper's framework around it (feature-level mutual learning, a self-ensemble teacher) is not
part of it: any distiller goes with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from metamixer_ray.mixing.config import MixingConfig
from metamixer_ray.mixing.local_mixing import draw_boxes, local_mix
from metamixer_ray.mixing.partners import random_partner
from metamixer_ray.mixing.plan import MixPlan


@dataclass(frozen=True)
class CutNMix:
    """Pastes ``cuts`` boxes of random other images into each, with ``local_probability`` per batch."""

    config: MixingConfig
    organised: bool = False

    def draw(self, rng: np.random.Generator, *, rows: int, height: int, width: int, stages: Sequence[int]) -> MixPlan:
        """See ``Mixer.draw``; ``stages`` is not used: Cut^nMix happens at the input."""
        config = self.config
        if rng.random() >= config.local_probability:
            return MixPlan(rows)
        partners, boxes = [], []
        for _ in range(config.cuts):
            partners.append(random_partner(rng, rows))
            boxes.append(draw_boxes(rng, rows, height=height, width=width, alpha=config.local_alpha))
        return MixPlan(rows, local=local_mix(torch.stack(partners), np.stack(boxes), height=height, width=width))
