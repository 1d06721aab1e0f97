"""The peers' ensemble with a learnt gate as everybody's teacher: ONE (Lan, Zhu, Gong 2018, arXiv 1806.04606) between
separate networks.

With z_j the logits of peer j for an image and h_j its embedding, the ensemble is z_e = sum_j g_j z_j with the gate
g = softmax_j(w_j . h_j + b_j), and the loss of peer i is

    T squared KL(p_e || p_i)  +  CE(z_e),  with p at temperature T, and CE the cross-entropy with the label weights.

The second term trains the gate; ``--kd-weight`` and its ramp weigh both. In the paper the branches of one network share
their first layers, and one gate looks at those; here each peer scores its own embedding with a w and b of its own, and
learns them, and its embedding, through its own share of the ensemble only. The teacher carries no gradient, nor do the
z_j inside of CE, by which the paper's branches learn as well. The authors' code (``Lan1991Xu/ONE_NeurIPS2018``) has
batch normalisation and a ReLU between gate and softmax; here the scores go into it as they are.

Exchanged: every peer's logits and scores, 4 B (C + 1) bytes to each other peer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamixer_ray.distill.heard import Heard, Reduce
from metamixer_ray.distill.own import Own
from metamixer_ray.distill.teaching import LOGITS, Teaching

SCORES = "gate/scores"
"""[B] what the gate's softmax is taken of."""


class GatedEnsembleTeacher(nn.Module):
    """Has all peers imitate the mean of their logits that the gate weighs, image by image."""

    reduce: Reduce = "each"

    def __init__(self, teaching: Teaching, *, width: int) -> None:
        super().__init__()
        self._teaching = teaching
        self.score = nn.Linear(width, 1)

    def say(self, own: Own) -> dict[str, Tensor]:
        """Its logits and scores."""
        return {LOGITS: own.logits.detach().float(), SCORES: self._scores(own.embedding).detach()}

    def loss(self, own: Own, heard: Heard) -> Tensor:
        """The divergence from the gated ensemble, and the ensemble's cross-entropy."""
        if heard.peers == 1:
            return torch.zeros((), device=own.logits.device)
        with torch.autocast(own.logits.device.type, enabled=False):
            mine = torch.arange(heard.peers, device=own.logits.device) == heard.own_index
            scores = torch.where(mine[:, None], self._scores(own.embedding), heard.each[SCORES])
            ensemble = (F.softmax(scores, dim=0)[:, :, None] * heard.each[LOGITS]).sum(0)
            return self._teaching(own.logits, ensemble.detach(), own.targets) + F.cross_entropy(ensemble, own.targets)

    def _scores(self, embedding: Tensor) -> Tensor:
        with torch.autocast(embedding.device.type, enabled=False):
            scores: Tensor = self.score(embedding).squeeze(1)
            return scores
