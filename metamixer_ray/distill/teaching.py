"""Distillers whose peers imitate one teacher made of all their logits, by plain KL divergence or by that of DKD.

Both are at temperature T and times T squared (Hinton et al. 2015, arXiv 1503.02531), so that gradients keep their
scale when T changes. The teacher carries no gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from metamixer_ray.distill.config import DistillConfig
from metamixer_ray.distill.heard import Heard, Reduce
from metamixer_ray.distill.own import Own

Teaching = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(logits [B, C], the teacher's logits [B, C], label weights [B, C]) -> a float32 scalar``, mean over the batch."""


LOGITS = "teacher/logits"
"""[B, C] logits, or what of them the teacher is made of."""


class OneTeacher(ABC):
    """A distiller whose peers all imitate the same :meth:`teacher`, in the way of ``teaching``."""

    reduce: Reduce

    def __init__(self, teaching: Teaching) -> None:
        self._teaching = teaching

    def say(self, own: Own) -> dict[str, Tensor]:
        """Its logits [B, C] themselves."""
        return {LOGITS: own.logits.detach().float()}

    def loss(self, own: Own, heard: Heard) -> Tensor:
        """The divergence from the teacher."""
        if heard.peers == 1:
            return torch.zeros((), device=own.logits.device)
        return self._teaching(own.logits, self.teacher(own, heard), own.targets)

    @abstractmethod
    def teacher(self, own: Own, heard: Heard) -> Tensor:
        """The teacher's logits [B, C], given what this peer has and what was heard of all."""


def build_teaching(config: DistillConfig) -> Teaching:
    """The one that ``config.divergence`` names."""
    temperature = config.temperature
    if config.divergence == "dkd":
        return lambda logits, teacher, targets: decoupled_divergence(
            logits, teacher, targets, temperature, alpha=config.dkd_alpha, beta=config.dkd_beta
        )
    return lambda logits, teacher, targets: divergence(logits, teacher, temperature)


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T squared times the mean over the batch of KL(p_teacher || p), in nats."""
    with torch.autocast(logits.device.type, enabled=False):
        log_probabilities, log_teacher = (
            F.log_softmax(z.float() / temperature, dim=1) for z in (logits, teacher.detach())
        )
        return temperature**2 * F.kl_div(log_probabilities, log_teacher, log_target=True, reduction="batchmean")


def decoupled_divergence(
    logits: Tensor, teacher: Tensor, targets: Tensor, temperature: float, *, alpha: float, beta: float
) -> Tensor:
    """Decoupled knowledge distillation (Zhao, Cui, Song, Qiu, Liang 2022, arXiv 2203.08679), equation 7.

    T squared times the mean over the batch of ``alpha * TCKD + beta * NCKD``. With p the share of the target class,
    TCKD is KL between (p_teacher, 1 - p_teacher) and (p, 1 - p), and NCKD is KL between the distributions over the
    other classes. alpha = 1 and beta = 1 - p_teacher make it the plain divergence (equation 5); the paper and its code
    have constants. A mixed image has several labels and the paper only one: the target class is the heaviest.
    """
    with torch.autocast(logits.device.type, enabled=False):
        target = targets.argmax(dim=1, keepdim=True)
        own, theirs = (_decoupled(z.float() / temperature, target) for z in (logits, teacher.detach()))
        binary, others = (
            F.kl_div(mine, teachers, log_target=True, reduction="batchmean")
            for mine, teachers in zip(own, theirs, strict=True)
        )
        return temperature**2 * (alpha * binary + beta * others)


def _decoupled(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of (p, 1 - p) of the target class [B, 2], and of the distribution over the others [B, C - 1]."""
    index = torch.arange(logits.shape[1] - 1, device=logits.device)
    # The target is stepped over by its index: with a mask a GPU would be waited for.
    others = logits.gather(1, index + (index >= target))
    binary = torch.cat([logits.gather(1, target), others.logsumexp(1, keepdim=True)], dim=1)
    return F.log_softmax(binary, dim=1), F.log_softmax(others, dim=1)
