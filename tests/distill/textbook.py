"""The losses as their papers write them: pairwise, from every peer's own tensors, in float64."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def mutual_learning(logits: Sequence[Tensor], own: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean over the others of T^2 KL(p_j || p_own), and its gradient into the own logits."""
    own_logits = logits[own].double().requires_grad_()
    log_own = F.log_softmax(own_logits / temperature, dim=1)
    pairs = [
        F.kl_div(
            log_own,
            F.log_softmax(other.double() / temperature, dim=1),
            log_target=True,
            reduction="batchmean",
        )
        for index, other in enumerate(logits)
        if index != own
    ]
    loss = torch.stack(pairs).mean() * temperature**2
    return loss.detach(), torch.autograd.grad(loss, own_logits)[0]


def ensemble_teaching(logits: Sequence[Tensor], own: int, temperature: float) -> tuple[Tensor, Tensor]:
    """T^2 KL(p_e || p_own) of the ensemble's softmax(mean of all logits / T), and its gradient into the own logits."""
    teacher = torch.stack([each.double() for each in logits]).mean(0)
    own_logits = logits[own].double().requires_grad_()
    p_teacher, p_own = (F.softmax(each / temperature, dim=1) for each in (teacher, own_logits))
    loss = temperature**2 * (p_teacher * (p_teacher.log() - p_own.log())).sum(1).mean()
    return loss.detach(), torch.autograd.grad(loss, own_logits)[0]


def attention_map(maps: Tensor, grid: int) -> Tensor:
    """Zagoruyko and Komodakis' map of [B, C, H, W]; zeros give the uniform map."""
    pooled = F.adaptive_avg_pool2d(maps.square().mean(1, keepdim=True), grid).flatten(1)
    norms = pooled.square().sum(1, keepdim=True).sqrt()
    return torch.where(norms > 0, pooled / norms.clamp_min(1e-30), torch.full_like(pooled, 1 / grid))


def similarity(maps: Tensor) -> Tensor:
    """Cosines between the pooled features of [B, C, H, W]."""
    pooled = maps.mean((2, 3))
    return F.cosine_similarity(pooled[:, None], pooled[None], dim=2)


def statistics(kind: str, features: Sequence[Sequence[Tensor]], own: int, grid: int) -> tuple[Tensor, list[Tensor]]:
    """Mean over stages and other peers of the pairwise loss on features[peer][stage], and its gradients."""
    own_features = [stage.double().requires_grad_() for stage in features[own]]
    losses = []
    for peer, stages in enumerate(features):
        if peer == own:
            continue
        for own_stage, stage in zip(own_features, stages, strict=True):
            if kind == "attention":
                difference = attention_map(own_stage, grid) - attention_map(stage.double(), grid)
                losses.append(difference.square().sum(1).mean())
            else:
                losses.append((similarity(own_stage) - similarity(stage.double())).square().mean())
    loss = torch.stack(losses).mean()
    return loss.detach(), list(torch.autograd.grad(loss, own_features))
