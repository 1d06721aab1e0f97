"""KDCL's fourth teacher, "general" (Guo et al., CVPR 2020; see ``kdcl``): one share per peer, by its errors on images
held out from training, measured anew after every epoch.

With e_i the difference between the probabilities of peer i and the one-hot label of a held out image, and
C_ij = mean(e_i . e_j) over these images, the shares a = C^-1 1 / (1' C^-1 1), of sum 1, give the mean prediction of
least expected squared error (Perrone and Cooper 1993, whom the paper follows). Peers whose errors are alike may get
negative shares. The teacher of all images is z_t = sum_i a_i z_i; until the first measurement all shares are 1 / P.
Held out is the validation split (``--validation-fraction``), so that is not untouched by the training any more.

Exchanged: each peer says a_i z_i and hears the mean of the others': one all-reduce of [B, C], whatever P. After each
epoch, also one that isn't evaluated, each gathers all peers' errors on the validation split.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from metamixer_ray.distill.heard import Heard, Reduce
from metamixer_ray.distill.own import Own
from metamixer_ray.distill.teaching import LOGITS, Teaching

ALIKE = 1e-4
"""Added to the diagonal of C, as a share of its mean: peers of equal errors then get equal shares."""


class GeneralTeacher(nn.Module):
    """Has all peers imitate the mean of their logits in which each has the share that its errors earn it."""

    reduce: Reduce = "mean"
    share: Tensor

    def __init__(self, teaching: Teaching, *, peers: int) -> None:
        super().__init__()
        self._teaching = teaching
        # A buffer: it is in the checkpoints, and nothing that an optimizer learns.
        self.register_buffer("share", torch.tensor(1 / peers))

    def say(self, own: Own) -> dict[str, Tensor]:
        """Its logits [B, C] times its share."""
        return {LOGITS: self.share * own.logits.detach().float()}

    def loss(self, own: Own, heard: Heard) -> Tensor:
        """The divergence from the teacher."""
        if heard.peers == 1:
            return torch.zeros((), device=own.logits.device)
        teacher = self.share * own.logits.detach().float() + (heard.peers - 1) * heard.others[LOGITS]
        return self._teaching(own.logits, teacher, own.targets)


class ErrorProducts:
    """Sums of e_i . e_j over images, for peers i and j; every peer adds the same images at the same time.

    Args:
        group: the process group of the peers.
        order: which peer each member of the group is.
    """

    def __init__(self, group: dist.ProcessGroup, order: Sequence[int], device: torch.device) -> None:
        self.group, self.order = group, order
        self.sums = torch.zeros(len(order), len(order), dtype=torch.float64, device=device)
        """[P, P] in the order of the peers."""

    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Count a batch: this peer's ``probabilities`` float32 [B, C], ``labels`` int64 [B]."""
        errors = probabilities - F.one_hot(labels, probabilities.shape[1])
        each = [torch.empty_like(errors) for _ in self.order]
        # A list of the peers' places, filled in the order of the group's members.
        dist.all_gather([each[peer] for peer in self.order], errors, group=self.group)
        flat = torch.stack(each).flatten(1).double()
        self.sums += flat @ flat.T

    def shares(self, replicas: dist.ProcessGroup | None) -> Tensor:
        """The peers' :func:`least_error_shares` [P] over what all members of ``replicas`` have counted."""
        if replicas is not None:
            dist.all_reduce(self.sums, group=replicas)
        return least_error_shares(self.sums)


def least_error_shares(products: Tensor) -> Tensor:
    """Shares [P] of sum 1 that make a' C a least, for ``products`` C float64 [P, P] up to a factor; equal ones where no
    peer errs at all."""
    scale = products.diagonal().mean()
    if not scale > 0:
        return torch.full_like(products[0], 1 / len(products))
    firm = products / scale + ALIKE * torch.eye(len(products), dtype=products.dtype, device=products.device)
    weights = torch.linalg.solve(firm, torch.ones_like(products[0]))
    return weights / weights.sum()
