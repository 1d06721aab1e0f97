"""The peers' ensemble as everybody's teacher: the mean of all peers' logits, the learner's own among them.

The loss of peer i is KL(p_e || p_i) with p_e = softmax(mean_j z_j / T), at temperature T and times T squared: the
distillation term of ONE (Lan, Zhu, Gong 2018, arXiv 1806.04606) between separate networks, with equal weights where
its branches have a learnt gate. The teacher carries no gradient. Peers hear the mean of the others' logits [B, C].
"""

import torch
from torch import Tensor

from metamixer_ray.distill.heard import Heard, Reduce
from metamixer_ray.distill.teaching import Teaching

LOGITS = "ensemble/logits"
"""[B, C] logits."""


class EnsembleTeacher:
    """Has a peer imitate all peers' mean logits, in the way of ``teaching``."""

    reduce: Reduce = "mean"

    def __init__(self, teaching: Teaching) -> None:
        self._teaching = teaching

    def say(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The ``logits`` [B, C] themselves."""
        return {LOGITS: logits.detach().float()}

    def loss(self, logits: Tensor, targets: Tensor, heard: Heard) -> Tensor:
        """The divergence from the mean logits; ``logits`` are [B, C]."""
        if not heard.others:
            return torch.zeros((), device=logits.device)
        teacher = torch.lerp(heard.others[LOGITS], logits.detach().float(), 1 / heard.peers)
        return self._teaching(logits, teacher, targets)
