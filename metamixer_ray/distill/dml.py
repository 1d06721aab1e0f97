"""Deep mutual learning (Zhang, Xiang, Hospedales, Lu 2018, arXiv 1706.00384), with a temperature.

The loss of peer i is the mean over the other peers j of KL(p_j || p_i) (their loss for larger cohorts), at
temperature T and times T squared (Hinton et al. 2015, arXiv 1503.02531) so that gradients keep their scale
when T changes; the paper itself has T = 1. Since log p_i doesn't depend on j,

    mean_j KL(p_j || p_i) = mean_j sum_c p_j log p_j  -  sum_c (mean_j p_j) log p_i,

the mean probabilities and the mean negative entropies of the others are all that peer i has to hear.
"""

import torch
from torch import Tensor

from metamixer_ray.distill.heard import Heard, Reduce
from metamixer_ray.distill.own import Own

PROBABILITIES = "dml/probabilities"
"""[B, C] probabilities at temperature T."""
NEGATIVE_ENTROPIES = "dml/negative_entropies"
"""[B] sum over classes of p log p, in nats."""


class DeepMutualLearning:
    """Pulls a peer's predictions towards each of the others' at temperature ``temperature``."""

    reduce: Reduce = "mean"

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def say(self, own: Own) -> dict[str, Tensor]:
        """The probabilities and negative entropies of its logits."""
        log_probabilities = self._log_probabilities(own.logits.detach())
        probabilities = log_probabilities.exp()
        negative_entropies = (probabilities * log_probabilities).sum(1)
        return {PROBABILITIES: probabilities, NEGATIVE_ENTROPIES: negative_entropies}

    def loss(self, own: Own, heard: Heard) -> Tensor:
        """T squared times the mean over batch and other peers of KL(p_j || p_i), in nats."""
        if not heard.others:
            return torch.zeros((), device=own.logits.device)
        with torch.autocast(own.logits.device.type, enabled=False):
            log_probabilities = self._log_probabilities(own.logits)
            cross_entropies = -(heard.others[PROBABILITIES] * log_probabilities).sum(1)
            divergences = heard.others[NEGATIVE_ENTROPIES] + cross_entropies
            return self.temperature**2 * divergences.mean()

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits.float() / self.temperature, dim=1)
