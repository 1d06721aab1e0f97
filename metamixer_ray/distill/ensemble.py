"""The peers' ensemble as everybody's teacher: the mean of all peers' logits, the learner's own among them.

The loss of peer i is KL(p_e || p_i) with p_e = softmax(mean_j z_j / T), at temperature T and times T squared: the
distillation term of ONE (Lan, Zhu, Gong 2018, arXiv 1806.04606) between separate networks, with equal weights where
its branches have a learnt gate (``ensemble-gated`` has one). The teacher carries no gradient. Peers hear the mean of
the others' logits [B, C].
"""

import torch
from torch import Tensor

from metamixer_ray.distill.heard import Heard, Reduce
from metamixer_ray.distill.own import Own
from metamixer_ray.distill.teaching import LOGITS, OneTeacher


class EnsembleTeacher(OneTeacher):
    """Has all peers imitate the mean of their logits."""

    reduce: Reduce = "mean"

    def teacher(self, own: Own, heard: Heard) -> Tensor:
        """The mean logits [B, C] of all peers."""
        return torch.lerp(heard.others[LOGITS], own.logits.detach().float(), 1 / heard.peers)
