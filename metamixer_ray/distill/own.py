"""What a peer itself has of one step, the counterpart of what it hears."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Own:
    """What this peer's network makes of a batch of B images of C classes, with its graph."""

    logits: Tensor
    """[B, C], any float dtype."""
    targets: Tensor
    """[B, C] label weights of the mixed images; every row sums to one."""
    embedding: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    """float32 [B, W], what flows out of the network's last stage, averaged over places. Given to distillers that learn
    something themselves; empty for the others."""
    stale: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0))
    """[P - 1, B, C] logits of this peer's copies of the others' networks; empty where none was asked."""
