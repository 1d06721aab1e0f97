"""The peers' ensemble as everybody's teacher: the mean of all peers' logits, the learner's own among them.

The loss of peer i is KL(p_e || p_i) with p_e = softmax(mean_j z_j / T), at temperature T and times T squared: the
distillation term of ONE (Lan, Zhu, Gong 2018, arXiv 1806.04606) between separate networks, with equal weights where
its branches have a learnt gate. The teacher carries no gradient. Peers hear the mean of the others' logits [B, C].
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from metamixer_ray.distill.heard import Heard, Reduce

LOGITS = "ensemble/logits"
"""[B, C] logits."""


class EnsembleTeacher:
    """Pulls a peer's predictions towards those of all peers' mean logits, at temperature ``temperature``."""

    reduce: Reduce = "mean"

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def say(self, logits: Tensor) -> dict[str, Tensor]:
        """The ``logits`` [B, C] themselves."""
        return {LOGITS: logits.detach().float()}

    def loss(self, logits: Tensor, heard: Heard) -> Tensor:
        """T squared times the mean over the batch of KL(p_e || p_i), in nats; ``logits`` are [B, C]."""
        if not heard.others:
            return torch.zeros((), device=logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            own = logits.float()
            teacher = torch.lerp(heard.others[LOGITS], own.detach(), 1 / heard.peers)
            log_probabilities, log_teacher = (F.log_softmax(z / self.temperature, dim=1) for z in (own, teacher))
            divergence = F.kl_div(log_probabilities, log_teacher, log_target=True, reduction="batchmean")
            return self.temperature**2 * divergence
