"""The losses as their papers write them: pairwise, from every peer's own tensors, in float64."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.special import logsumexp
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
    return _imitation(logits[own], torch.stack([each.double() for each in logits]).mean(0), temperature)


def naive_teaching(logits: Sequence[Tensor], targets: Tensor, own: int, temperature: float) -> tuple[Tensor, Tensor]:
    """KDCL-Naive: row by row the teacher is the peer of smallest cross-entropy."""
    rows = []
    for row, weights in enumerate(targets.double()):
        costs = [float(-(weights * each[row].double().log_softmax(0)).sum()) for each in logits]
        rows.append(logits[costs.index(min(costs))][row].double())
    return _imitation(logits[own], torch.stack(rows), temperature)


def linear_teaching(logits: Sequence[Tensor], targets: Tensor, own: int, temperature: float) -> tuple[Tensor, Tensor]:
    """KDCL-Linear: row by row the weighted mean of the peers' logits of smallest cross-entropy, by scipy's SLSQP."""
    rows = []
    for row, weights in enumerate(targets.double()):
        each = torch.stack([z[row].double() for z in logits])
        rows.append(torch.from_numpy(_best_mean(each.numpy(), weights.numpy())))
    return _imitation(logits[own], torch.stack(rows), temperature)


def minlogit_teaching(logits: Sequence[Tensor], targets: Tensor, own: int, temperature: float) -> tuple[Tensor, Tensor]:
    """KDCL-MinLogit: the lowest logits, once each peer's logit of the true class is taken off (its mean, of a mix)."""
    weights = targets.double()
    shifted = [z.double() - (weights * z.double()).sum(1)[:, None] for z in logits]
    lowest = shifted[0]
    for each in shifted[1:]:
        lowest = torch.where(each < lowest, each, lowest)
    return _imitation(logits[own], lowest, temperature)


def decoupled(
    logits: Tensor, teacher: Tensor, targets: Tensor, temperature: float, *, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """DKD, equations 2 to 7: T^2 (alpha TCKD + beta NCKD), row by row, and its gradient into ``logits``."""
    own = logits.double().requires_grad_()
    losses = []
    for row, weights in enumerate(targets):
        target = int(weights.argmax())
        rest = [c for c in range(len(weights)) if c != target]
        student, theirs = ((z[row] / temperature).softmax(0) for z in (own, teacher.double()))
        b = [torch.stack((p[target], p[rest].sum())) for p in (student, theirs)]
        hat = [p[rest] / p[rest].sum() for p in (student, theirs)]
        binary, others = ((t * (t / s).log()).sum() for s, t in (b, hat))
        losses.append(alpha * binary + beta * others)
    loss = temperature**2 * torch.stack(losses).mean()
    return loss.detach(), torch.autograd.grad(loss, own)[0]


def _imitation(logits: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    own = logits.double().requires_grad_()
    p_teacher, p_own = (F.softmax(each / temperature, dim=1) for each in (teacher, own))
    loss = temperature**2 * (p_teacher * (p_teacher.log() - p_own.log())).sum(1).mean()
    return loss.detach(), torch.autograd.grad(loss, own)[0]


def _best_mean(logits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of logits [P, C] the weighted mean [C] whose cross-entropy with ``weights`` is the smallest."""

    def cost(shares: np.ndarray) -> tuple[float, np.ndarray]:
        mean = shares @ logits
        normaliser = logsumexp(mean)
        return normaliser - weights @ mean, logits @ (np.exp(mean - normaliser) - weights)

    peers = len(logits)
    whole = {"type": "eq", "fun": lambda shares: shares.sum() - 1, "jac": lambda shares: np.ones(peers)}
    found = minimize(
        cost,
        np.full(peers, 1 / peers),
        jac=True,
        bounds=[(0, 1)] * peers,
        constraints=whole,
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    best: np.ndarray = found.x @ logits
    return best


@dataclass
class View:
    """All that a peer has of a batch: logits [B, C], embeddings [B, W], and the parameters of its distiller."""

    logits: Tensor
    embedding: Tensor
    parameters: Mapping[str, Tensor]

    def projected(self, name: str) -> Tensor:
        """The linear layer ``name`` of the embeddings."""
        return linear(self.embedding, self.parameters, name)


def linear(x: Tensor, parameters: Mapping[str, Tensor], name: str) -> Tensor:
    y = x @ parameters[f"{name}.weight"].T
    return y + parameters[f"{name}.bias"] if f"{name}.bias" in parameters else y


def with_gradients(loss: Callable[[Sequence[View]], Tensor], views: Sequence[View], own: int) -> tuple[Tensor, View]:
    """The loss in float64, and its gradients into all that the peer ``own`` has (zeros where there are none)."""
    doubled = [
        View(v.logits.double(), v.embedding.double(), {k: p.detach().double() for k, p in v.parameters.items()})
        for v in views
    ]
    mine = doubled[own]
    leaves = [mine.logits, mine.embedding, *mine.parameters.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    value = loss(doubled)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]
    return value.detach(), View(filled[0], filled[1], dict(zip(mine.parameters, filled[2:], strict=True)))


def diverse_peers(views: Sequence[View], own: int, temperature: float) -> Tensor:
    """OKDDip, network-based, image by image; the last view is the group leader's."""
    auxiliaries, q = views[:-1], [(v.logits / temperature).softmax(1) for v in views]
    losses = []
    for x in range(len(q[0])):
        if own == len(auxiliaries):
            alpha = torch.full((len(auxiliaries),), 1 / len(auxiliaries), dtype=torch.float64)
        else:
            query = views[own].projected("query")[x]
            alpha = torch.stack([query @ peer.projected("key")[x] for peer in auxiliaries]).softmax(0)
        target = sum((a * q[b][x].detach() for b, a in enumerate(alpha)), torch.zeros(()))
        losses.append((target * (target.log() - q[own][x].log())).sum())
    return temperature**2 * torch.stack(losses).mean()


def gated_teaching(views: Sequence[View], targets: Tensor, own: int, temperature: float) -> Tensor:
    """ONE's loss between networks: KL from the gated ensemble, and the ensemble's own cross-entropy, image by image."""
    losses = []
    for x, weights in enumerate(targets.double()):
        gate = torch.stack([view.projected("score")[x, 0] for view in views]).softmax(0)
        ensemble = sum((g * view.logits[x].detach() for g, view in zip(gate, views, strict=True)), torch.zeros(()))
        teacher, student = (z / temperature for z in (ensemble.detach(), views[own].logits[x]))
        kl = (teacher.softmax(0) * (teacher.log_softmax(0) - student.log_softmax(0))).sum()
        losses.append(temperature**2 * kl - (weights * ensemble.log_softmax(0)).sum())
    return torch.stack(losses).mean()


def mutual_contrast(
    views: Sequence[View],
    targets: Tensor,
    own: int | None,
    temperature: float,
    tau: float,
    weights: Sequence[float],
) -> Tensor:
    """MCL, image by image: its sum over all peers and pairs of them, or of that what the peer ``own`` learns by.

    ``weights`` are of VCL, ICL, soft VCL and soft ICL.
    """
    heads = []
    for view in views:
        hidden = view.projected("head.0").clamp_min(0)
        raw = linear(hidden, view.parameters, "head.2")
        heads.append(raw / raw.square().sum(1, keepdim=True).sqrt())
    labels = targets.argmax(1).tolist()

    def alike(i: int, j: int) -> Tensor:
        return heads[i] @ heads[j].T / tau

    def contrast(i: int, j: int) -> Tensor:
        costs, energies = [], alike(i, j).exp()
        for x, label in enumerate(labels):
            others = [y for y in range(len(labels)) if y != x]
            positives = [y for y in others if labels[y] == label]
            if positives:
                costs.append(-(energies[x, positives] / energies[x, others].sum()).log().mean())
        return torch.stack(costs).mean()

    def kl(teacher: Tensor, student: Tensor) -> Tensor:
        p, q = (teacher.detach() / temperature).softmax(1), (student / temperature).softmax(1)
        return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()

    vcl, icl, soft_vcl, soft_icl = weights
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(len(views)):
        if own in (None, i):
            loss = loss + vcl * contrast(i, i)
        for j in range(len(views)):
            if i != j and own in (None, i):
                loss = loss + soft_vcl * kl(alike(j, j), alike(i, i))
            if i != j and own in (None, i, j):
                loss = loss + icl * contrast(i, j) + soft_icl * kl(alike(j, i), alike(i, j))
    return loss


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
