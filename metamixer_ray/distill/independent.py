"""No distillation: peers share batches and nothing else, the baseline of every comparison."""

import torch
from torch import Tensor

from metamixer_ray.distill.heard import Heard, Reduce


class Independent:
    """Says nothing and learns nothing from the others; control still rides on the exchange."""

    reduce: Reduce = "mean"

    def say(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def loss(self, logits: Tensor, targets: Tensor, heard: Heard) -> Tensor:
        """Zero, without a graph."""
        return torch.zeros((), device=logits.device)
