"""What one process counts of all peers' predictions: scores, accuracy by class, calibration, who agrees with whom."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from metamixer_ray.evaluation import ECE_BINS, ScoreSums


class Tally:
    """Counts over the images that several peers were shown.

    Args:
        peers: P, how many.
        classes: C, how many.
    """

    def __init__(self, peers: int, classes: int, device: torch.device) -> None:
        self.peers, self.classes = peers, classes
        # The ensemble comes last, and only where there is more than one peer.
        self._sums = [ScoreSums(device) for _ in range(peers + (peers > 1))]
        self._images = torch.zeros(classes, dtype=torch.float64, device=device)
        self._hits = torch.zeros(len(self._sums), classes, dtype=torch.float64, device=device)
        self._agreed = torch.zeros(peers, peers, dtype=torch.int64, device=device)
        self._unanimous = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, each: Tensor, labels: Tensor) -> None:
        """Count a batch: the peers' probabilities float32 [P, B, C], ``labels`` int64 [B]."""
        if self.peers > 1:
            each = torch.cat([each, each.mean(dim=0, keepdim=True)])
        for sums, probabilities in zip(self._sums, each, strict=True):
            sums.add(probabilities, labels)
        predicted = each.argmax(dim=2)
        right = (predicted == labels).double()
        self._images.index_add_(0, labels, torch.ones_like(right[0]))
        self._hits.index_add_(1, labels, right)
        peers = predicted[: self.peers]
        for peer, prediction in enumerate(peers):
            self._agreed[peer] += (peers == prediction).sum(dim=1)
        self._unanimous += (peers == peers[0]).all(dim=0).sum()

    def scores(self, names: Sequence[str]) -> dict[str, Any]:
        """The peers' :class:`~metamixer_ray.evaluation.Scores` under their names, the ensemble's, and the agreement.

        ``{"images": n, "peers": [...], "ensemble": ..., "agreement": ...}`` as in summary.json; the last two are None
        for a single peer.
        """
        each = [asdict(sums.scores()) for sums in self._sums]
        images, several = int(self._images.sum()), self.peers > 1
        return {
            "images": images,
            "peers": [{"name": name, **scores} for name, scores in zip(names, each[: self.peers], strict=True)],
            "ensemble": each[-1] if several else None,
            "agreement": int(self._unanimous) / images if several else None,
        }

    def details(self, classes: Sequence[str]) -> dict[str, Any]:
        """What stands behind the scores, peers in their order.

        ``per_class``: images and top-1 of each class, None for one without images. ``calibration``: a
        :class:`~metamixer_ray.evaluation.Reliability` of each peer and the ensemble. ``pairwise_agreement``: fractions
        [P][P] of the images on which two peers predict the same class.
        """
        several = self.peers > 1
        reliability = [asdict(sums.reliability()) for sums in self._sums]
        counts, images = self._images.tolist(), int(self._images.sum())
        shares = [
            [None if not n else hit / n for hit in hits] for hits, n in zip(self._hits.T.tolist(), counts, strict=True)
        ]
        return {
            "per_class": [
                {
                    "class": name,
                    "images": int(n),
                    "peers": top1[: self.peers],
                    "ensemble": top1[-1] if several else None,
                }
                for name, n, top1 in zip(classes, counts, shares, strict=True)
            ],
            "calibration": {
                "bins": ECE_BINS,
                "peers": reliability[: self.peers],
                "ensemble": reliability[-1] if several else None,
            },
            "pairwise_agreement": [[int(n) / images for n in row] for row in self._agreed.tolist()],
        }
