"""MetaMixer (Wang, Xiao, Yamasaki: "MetaMixer: A Regularization Strategy for Online Knowledge Distillation",
arXiv 2303.07951, 2023).

Published (abstract and Figure 1): two stages of mixing, *local* and *global*, "an organized mixing of four
different images from two random classes". Local mixing fosters localizable low-level knowledge and happens
before the image input; global mixing encourages transfer at different levels of abstraction and can happen at
any stage of feature extraction. All students of an online distillation see it together. It is a
regularisation and goes with any loss.

Not published in what we could read, hence **our reading** and not the paper's words: which row meets which
(the ``pairing``), that local mixing is CutMix and global mixing a per-row interpolation, that labels are
mixed by exact area and by lambda, the Beta parameters, and how often either happens.

Batches are quadruples (A1, A2, B1, B2), two images of each of two classes; see ``quadruples``:

============== =========================== ============================
pairing        local mixing with           global mixing with
============== =========================== ============================
cross-class    swap classes (A1 <-> B1)    swap members (A1 <-> A2)
within-class   swap members (A1 <-> A2)    swap classes (A1 <-> B1)
free           a random row                a random row
============== =========================== ============================

In both organised pairings, a row that is mixed locally and globally holds all four images of its quadruple
and no more than two classes. ``free`` is the unorganised ablation: any batch, up to four classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metamixer_ray.mixing.config import MixingConfig
from metamixer_ray.mixing.global_mixing import draw_global
from metamixer_ray.mixing.local_mixing import draw_local
from metamixer_ray.mixing.partners import random_partner
from metamixer_ray.mixing.plan import MixPlan
from metamixer_ray.mixing.quadruples import require_quadruples, swap_classes, swap_members


@dataclass(frozen=True)
class MetaMixer:
    """Local mixing at the input, then global mixing at a random stage; each on its own share of the batches.

    The two are drawn by independent coins (``local_probability``, ``global_probability``) or, with
    ``mix_together``, by one coin (``local_probability``).
    """

    config: MixingConfig

    @property
    def organised(self) -> bool:
        """True but for the ``free`` pairing."""
        return self.config.pairing != "free"

    def draw(self, rng: np.random.Generator, *, rows: int, height: int, width: int, stages: Sequence[int]) -> MixPlan:
        """See ``Mixer.draw``; the stage is drawn per batch, uniformly from ``stages``."""
        config = self.config
        if self.organised:
            require_quadruples(rows)
        coin, second_coin = rng.random(2)
        if config.mix_together:
            mix_locally = mix_globally = bool(coin < config.local_probability)
        else:
            mix_locally = bool(coin < config.local_probability)
            mix_globally = bool(second_coin < config.global_probability)
        local = glob = None
        local_partner, global_partner = self._partners(rng, rows)
        if mix_locally:
            local = draw_local(rng, local_partner, height=height, width=width, alpha=config.local_alpha)
        if mix_globally:
            stage = stages[int(rng.integers(len(stages)))]
            glob = draw_global(rng, global_partner, stage=stage, alpha=config.global_alpha)
        return MixPlan(rows, local, glob)

    def _partners(self, rng: np.random.Generator, rows: int) -> tuple[Tensor, Tensor]:
        """The rows that local and global mixing pair each row with."""
        if not self.organised:
            return random_partner(rng, rows), random_partner(rng, rows)
        index = torch.arange(rows)
        if self.config.pairing == "cross-class":
            return swap_classes(index), swap_members(index)
        return swap_members(index), swap_classes(index)
