"""Mutual contrastive learning of embeddings (Yang, An, Cai, Xu: "Mutual Contrastive Learning for Visual Representation
Learning", AAAI 2022, arXiv 2104.12565), between the last stages of the peers.

A projection head (linear, ReLU, linear, to length 1) turns the embedding of image x in peer i into v_i(x), with
D = ``--projection-dim`` numbers. Peer i's image x is contrasted with the other images y of the batch as peer j sees
them:

    p_ij(y | x) = softmax_y(v_i(x) . v_j(y) / tau),  tau = ``--contrast-temperature``
    C_ij = - mean over x, and over the y of the class of x, of log p_ij(y | x).

The loss of peer i, with KL between all rows of similarities v . v / tau at temperature T and times T squared, is

    ``--vcl-weight``       C_ii                                          vanilla contrast (VCL)
    ``--icl-weight``       sum_j C_ij + C_ji                             interactive contrast (ICL)
    ``--soft-vcl-weight``  sum_j KL(similarities jj || ii)               soft VCL
    ``--soft-icl-weight``  sum_j KL(ji || ij) + KL(ij || ji)             soft ICL; what stands first is held fixed

over the other peers j. ICL and soft ICL of a pair are in the losses of both peers, so that each takes from them what
concerns its own embeddings: the gradients are those of the sum over all peers and pairs, without anything heard
carrying one. Weights and tau are those of the authors' L-MCL code (``winycg/L-MCL``; that of MCL has tau = 0.07).
Its layer-wise form (arXiv 2207.11518), with weights of stages learnt by a meta-network, is not here.

Exchanged: every peer's v, 4 B D bytes to each other peer. With replicas, images are contrasted within a replica's
slice.

Where paper and public code (``winycg/MCL``) differ, this is the code: the paper's soft terms compare the p of above,
the code's compare softmax(v . v / tau / T) over all images, x among them. The class of a mixed image is its heaviest
label. An image without another of its class in the batch is left out of C; ``--sampler quadruple`` gives each image
one, as the batches of that code do.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamixer_ray.distill.config import DistillConfig
from metamixer_ray.distill.heard import Heard, Reduce
from metamixer_ray.distill.own import Own
from metamixer_ray.distill.teaching import divergence

EMBEDDINGS = "mcl/embeddings"
"""[B, D] projected embeddings of length 1."""


class MutualContrast(nn.Module):
    """Contrasts the images of a batch across peers; ``width`` is that of the embedding, ``dim`` that of its
    projection."""

    reduce: Reduce = "each"

    def __init__(self, config: DistillConfig, *, width: int, dim: int) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Sequential(nn.Linear(width, dim), nn.ReLU(), nn.Linear(dim, dim))

    def say(self, own: Own) -> dict[str, Tensor]:
        """Its projected embeddings."""
        return {EMBEDDINGS: self._project(own.embedding).detach()}

    def loss(self, own: Own, heard: Heard) -> Tensor:
        """The weighted sum of the four; its gradient goes to the embedding and the projection head."""
        if heard.peers == 1:
            return torch.zeros((), device=own.logits.device)
        config, each = self.config, heard.each[EMBEDDINGS]
        with torch.autocast(own.logits.device.type, enabled=False):
            ours = self._project(own.embedding)
            classes = own.targets.argmax(dim=1)
            alike = ours @ ours.T / config.contrast_temperature
            loss = config.vcl_weight * contrast(alike, classes)
            for theirs in (*each[: heard.own_index], *each[heard.own_index + 1 :]):
                loss = loss + self._between(alike, ours, theirs, classes)
        return loss

    def _between(self, alike: Tensor, ours: Tensor, theirs: Tensor, classes: Tensor) -> Tensor:
        """What there is to learn of one other peer. Embeddings are [B, D], similarities [B, B]."""
        config, temperature = self.config, self.config.temperature
        across = ours @ theirs.T / config.contrast_temperature
        back = across.T
        interactive = contrast(across, classes) + contrast(back, classes)
        soft = divergence(alike, theirs @ theirs.T / config.contrast_temperature, temperature)
        soft_interactive = divergence(across, back, temperature) + divergence(back, across, temperature)
        return (
            config.icl_weight * interactive + config.soft_vcl_weight * soft + config.soft_icl_weight * soft_interactive
        )

    def _project(self, embedding: Tensor) -> Tensor:
        with torch.autocast(embedding.device.type, enabled=False):
            return F.normalize(self.head(embedding), dim=1)


def contrast(similarities: Tensor, classes: Tensor) -> Tensor:
    """How badly each image's own class is told from the batch, a scalar in nats.

    The mean, over images that have another of their class, of the mean over those of -log p, where p is the softmax of
    ``similarities`` [B, B] over all columns but the image's own; ``classes`` are [B]. Zero when no image has another.
    """
    self_contrast = torch.eye(len(classes), dtype=torch.bool, device=classes.device)
    positive = (classes[:, None] == classes) & ~self_contrast
    log_shares = F.log_softmax(similarities.masked_fill(self_contrast, -torch.inf), dim=1)
    counts = positive.sum(1)
    costs = -torch.where(positive, log_shares, 0.0).sum(1) / counts.clamp_min(1)
    return costs.sum() / (counts > 0).sum().clamp_min(1)
