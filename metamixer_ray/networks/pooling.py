"""The global average that ends all small-image families."""

import torch.nn.functional as F
from torch import Tensor


def global_average(maps: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C], the mean over places.

    The same as ``maps.mean((2, 3))``, but its gradient keeps channels last, which the layers below need to be fast.
    """
    return F.avg_pool2d(maps, maps.shape[-2:]).flatten(1)
