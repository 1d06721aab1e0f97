"""How good the peers are: each alone, their ensemble, and how far they agree.

Ranks of one replica index score the same images; what an ensemble needs of the others crosses the wire as a sum, so
the cost does not grow with the number of peers (KDCL general listens in, and gathers what each says).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from metamixer_ray.data import Batch, normalise
from metamixer_ray.mesh import PeerMesh
from metamixer_ray.precision import Arithmetic, autocast

ECE_BINS = 15


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Fractions, not percent; ``nll`` in nats."""

    top1: float
    top5: float
    """Top-k with k = min(5, classes)."""
    nll: float
    ece: float
    """Expected calibration error with 15 equal-width bins (Guo et al. 2017, eq. 3)."""


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """What a reliability diagram shows (Guo et al. 2017, fig. 1): images in equal-width bins of confidence."""

    images: list[int]
    confidence: list[float | None]
    """Mean confidence in each bin; None in an empty one."""
    accuracy: list[float | None]
    """Fraction of the bin's images that are classified rightly; None in an empty one."""


class ScoreSums:
    """Sums over images from which :class:`Scores` follow; they add up over batches and over replicas."""

    def __init__(self, device: torch.device) -> None:
        # 4 plain sums, then per bin: images, confidence, hits.
        self.sums = torch.zeros(4 + 3 * ECE_BINS, dtype=torch.float64, device=device)

    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Count a batch: ``probabilities`` float32 [B, C], ``labels`` int64 [B]."""
        picked = probabilities.gather(1, labels[:, None]).squeeze(1)
        confidence, prediction = probabilities.max(dim=1)
        hit = (prediction == labels).double()
        top = probabilities.topk(min(5, probabilities.shape[1]), dim=1).indices
        bins = (confidence * ECE_BINS).long().clamp_(0, ECE_BINS - 1)  # NaN is no bin
        self.sums[0] += len(labels)
        self.sums[1] += hit.sum()
        self.sums[2] += (top == labels[:, None]).any(dim=1).sum()
        self.sums[3] -= picked.clamp_min(torch.finfo(torch.float32).tiny).double().log().sum()
        per_bin = self.sums[4:].view(3, ECE_BINS)
        per_bin[0].index_add_(0, bins, torch.ones_like(hit))
        per_bin[1].index_add_(0, bins, confidence.double())
        per_bin[2].index_add_(0, bins, hit)

    def scores(self) -> Scores:
        """The scores of everything counted."""
        images, top1, top5, nll, *_ = self.sums.tolist()
        _, confidence, hits = self.sums[4:].view(3, ECE_BINS)
        ece = (confidence - hits).abs().sum().item() / images
        return Scores(top1=top1 / images, top5=top5 / images, nll=nll / images, ece=ece)

    def reliability(self) -> Reliability:
        """Confidence and accuracy in the bins of the calibration error."""
        images, confidence, hits = self.sums[4:].view(3, ECE_BINS).tolist()
        return Reliability(
            images=[int(n) for n in images],
            confidence=[c / n if n else None for c, n in zip(confidence, images, strict=True)],
            accuracy=[h / n if n else None for h, n in zip(hits, images, strict=True)],
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One rank's own scores, and what all peers reach together."""

    own: Scores
    ensemble: Scores | None
    """Of the mean of the peers' probabilities; None for a single peer."""
    agreement: float | None
    """Share of images on which all peers predict the same class; None for a single peer."""


def probabilities_of(
    network: nn.Module, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], precision: Arithmetic
) -> Tensor:
    """Softmax of a network's logits for uint8 ``images`` [B, 3, H, W] on its device: float32 [B, C]."""
    inputs = normalise(images, mean, std).contiguous(memory_format=torch.channels_last)
    with autocast(precision, images.device):
        logits = network(inputs)
    return F.softmax(logits.float(), dim=1)


@torch.inference_mode()
def predictions(
    networks: Sequence[nn.Module],
    batches: Iterable[Batch],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    precision: Arithmetic,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What ``networks``, which are on ``device``, say of each batch: probabilities float32 [N, B, C], labels int64 [B].

    They are in evaluation mode meanwhile, and back in the mode they were in afterwards.
    """
    modes = [network.training for network in networks]
    try:
        for network in networks:
            network.eval()
        for batch in batches:
            images = batch.images.to(device)
            each = [probabilities_of(network, images, mean, std, precision) for network in networks]
            yield torch.stack(each), batch.labels.to(device)
    finally:
        for network, mode in zip(networks, modes, strict=True):
            network.train(mode)


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    mesh: PeerMesh,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    precision: Arithmetic,
    listen: Callable[[Tensor, Tensor], None] | None = None,
) -> Evaluation:
    """Score ``network`` on ``batches``, which must be the same on all ranks of one replica index.

    ``listen`` is given each batch's probabilities float32 [B, C] and labels int64 [B].
    """
    own, together = ScoreSums(device), ScoreSums(device)
    agreed = torch.zeros(1, dtype=torch.float64, device=device)
    told = predictions([network], batches, mean=mean, std=std, device=device, precision=precision)
    for (probabilities,), labels in told:
        own.add(probabilities, labels)
        if listen is not None:
            listen(probabilities, labels)
        if mesh.peer_group is not None:
            prediction = probabilities.argmax(dim=1)
            dist.all_reduce(probabilities, group=mesh.peer_group)
            together.add(probabilities / mesh.peers, labels)
            # All equal exactly when the largest prediction and the smallest are the same.
            extremes = torch.stack([prediction, -prediction])
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=mesh.peer_group)
            agreed += (extremes[0] == -extremes[1]).sum()
    if mesh.replica_group is not None:
        for sums in (own.sums, together.sums, agreed):
            dist.all_reduce(sums, group=mesh.replica_group)
    if mesh.peer_group is None:
        return Evaluation(own=own.scores(), ensemble=None, agreement=None)
    return Evaluation(own=own.scores(), ensemble=together.scores(), agreement=agreed.item() / own.sums[0].item())
