"""KDCL (Guo, Wang, Wu, Yu, Liang, Hu, Luo: "Online Knowledge Distillation via Collaborative Learning", CVPR 2020).

All peers imitate one teacher, made of their logits z_1 ... z_P with the help of the labels; the loss of peer i is
KL(p_t || p_i) at temperature T, times T squared. The paper makes the teacher in these ways, per image:

* ``kdcl-naive``: z_t = z_k of the peer k whose cross-entropy is the smallest.
* ``kdcl-linear``: z_t = sum_k a_k z_k with the shares a (none negative, their sum 1) that give the smallest
  cross-entropy of z_t.
* ``kdcl-minlogit``: with z_c the logit of the true class, z_t = min_k (z_k - z_c,k), element by element.

Naive and linear hear every peer's logits [P, B, C]; min-logit hears one all-reduce of minima [B, C]. The paper's fourth
way, "general", which weighs peers by their errors on images held out from training, is in ``kdcl_general``.

We know of no code of the authors, so this is the paper's text. Its labels are single classes; for mixed images the
cross-entropy is that with the label weights t, and z_c is sum_c t_c z_c, which for a single class is its logit.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from metamixer_ray.distill.heard import Heard, Reduce
from metamixer_ray.distill.own import Own
from metamixer_ray.distill.teaching import LOGITS, OneTeacher

_BARRIERS, _NEWTON_STEPS = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5), 4


class NaiveTeacher(OneTeacher):
    """Has all peers imitate, image by image, the one that fits the label best."""

    reduce: Reduce = "each"

    def teacher(self, own: Own, heard: Heard) -> Tensor:
        """The logits [B, C] of the best peer of each image."""
        each = heard.each[LOGITS]
        best = _cross_entropies(each, own.targets).argmin(dim=0)
        return each[best, torch.arange(len(best), device=best.device)]


class LinearTeacher(OneTeacher):
    """Has all peers imitate, image by image, the weighted mean of their logits that fits the label best."""

    reduce: Reduce = "each"

    def teacher(self, own: Own, heard: Heard) -> Tensor:
        """The best mean [B, C] of all peers' logits."""
        each = heard.each[LOGITS]
        return torch.einsum("bp,pbc->bc", best_shares(each, own.targets), each)


class MinLogitTeacher(OneTeacher):
    """Has all peers imitate the lowest of their logits, each measured from its logit of the true class."""

    reduce: Reduce = "lowest"

    def say(self, own: Own) -> dict[str, Tensor]:
        """Its logits [B, C] less the true class's."""
        plain = own.logits.detach().float()
        return {LOGITS: plain - (own.targets * plain).sum(1, keepdim=True)}

    def teacher(self, own: Own, heard: Heard) -> Tensor:
        """The lowest [B, C] that any peer said."""
        return heard.lowest[LOGITS]


def _cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Of every image [...], with label weights ``targets`` [B, C]; ``logits`` are [..., B, C]."""
    return -(targets * F.log_softmax(logits, dim=-1)).sum(-1)


def best_shares(logits: Tensor, targets: Tensor) -> Tensor:
    """Shares [B, P], none negative and of sum 1, that give all peers' logits [P, B, C], image by image, the mean of
    smallest cross-entropy; that is less than 1e-5 P nats above the smallest.

    It is convex in the shares: Newton's method with a logarithmic barrier that keeps them positive, and gets lower.
    """
    z = logits.transpose(0, 1).double()
    towards = torch.einsum("bpc,bc->bp", z, targets.double())
    shares, rows = torch.full_like(towards, 1 / z.shape[1]), torch.arange(len(targets), device=z.device)
    lengths = torch.tensor([1.0, 0.5, 0.25, 0.1, 0.01], dtype=z.dtype, device=z.device)[:, None, None]
    for barrier in _BARRIERS:
        for _ in range(_NEWTON_STEPS):
            probabilities = torch.softmax(torch.einsum("bp,bpc->bc", shares, z), dim=1)
            weighted = z * probabilities[:, None]
            mean = weighted.sum(2)
            slope = mean - towards - barrier / shares
            curvature = weighted @ z.mT - mean[:, :, None] * mean[:, None] + torch.diag_embed(barrier / shares**2)
            # The step that solves for the slope, and what keeps the sum of the shares.
            both, _ = torch.linalg.solve_ex(curvature, torch.stack((slope, torch.ones_like(slope)), dim=2))
            total = both.sum(1, keepdim=True)
            # Logits so large that the curvature can't be solved leave the shares where they are.
            step = (both[..., 1] * total[..., 0] / total[..., 1] - both[..., 0]).nan_to_num(0.0, 0.0, 0.0)
            furthest = torch.where(step < 0, -shares / step, torch.inf).amin(1, keepdim=True)
            # Of some lengths the best one: a whole step may lead too far.
            tried = shares + lengths * step * (0.95 * furthest).clamp_max(1.0)
            costs = _cross_entropies(torch.einsum("nbp,bpc->nbc", tried, z), targets) - barrier * tried.log().sum(2)
            shares = tried[costs.argmin(0), rows]
    return shares.to(logits.dtype)
