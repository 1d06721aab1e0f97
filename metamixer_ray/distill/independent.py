"""No distillation: peers share batches and nothing else, the baseline of every comparison."""

import torch
from torch import Tensor

from metamixer_ray.distill.heard import Heard, Reduce
from metamixer_ray.distill.own import Own


class Independent:
    """Says nothing and learns nothing from the others; control still rides on the exchange."""

    reduce: Reduce = "mean"

    def say(self, own: Own) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def loss(self, own: Own, heard: Heard) -> Tensor:
        """Zero, without a graph."""
        return torch.zeros((), device=own.logits.device)
