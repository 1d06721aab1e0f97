"""What a peer would have and hear, computed in one process, for tests of formulas."""

from collections.abc import Sequence

import torch
from torch import Tensor

from metamixer_ray.distill import ControlSum, Heard, Own


def own_view(logits: Tensor) -> Own:
    """A peer's own of images whose labels are all classes alike, and whose embeddings are one number."""
    even = torch.full_like(logits, 1 / logits.shape[1], dtype=torch.float32)
    return Own(logits=logits, targets=even, embedding=logits.detach().float()[:, :1])


def heard_by(own_index: int, messages: Sequence[dict[str, Tensor]]) -> Heard:
    """What peer ``own_index`` hears when every peer says its message."""
    others = [message for index, message in enumerate(messages) if index != own_index]
    control = ControlSum(peers=len(messages), nonfinite=0, culprit=None, wish_checkpoint=0, wish_stop=0)
    return Heard(
        peers=len(messages),
        own_index=own_index,
        others={name: torch.stack([m[name] for m in others]).mean(0) for name in messages[0] if others},
        each={name: torch.stack([m[name] for m in messages]) for name in messages[0]},
        lowest={name: torch.stack([m[name] for m in messages]).amin(0) for name in messages[0]},
        read_control=lambda: control,
    )
