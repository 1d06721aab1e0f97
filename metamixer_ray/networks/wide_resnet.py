"""Wide residual networks: Zagoruyko and Komodakis 2016 (arXiv 1605.07146).

``wrn{depth}-{width}``: depth 6n + 4, pre-activation basic blocks, 16, 32 and 64 times ``width`` channels.
Published parameters (10 classes): 0.6M (40-1), 0.7M (16-2), 2.2M (40-2), 8.9M (40-4), 11.0M (16-8), 17.2M
(22-8), 36.5M (28-10).

``wrn20-8`` is not of that form (20 is no 6n + 4). The public code of the online-KD papers that report a
WRN-20-8 builds a bottleneck ResNet of 9 * 2 + 2 layers whose 3x3 convolutions are 8 times as wide, and so
does this name.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from metamixer_ray.networks.initialisation import initialise
from metamixer_ray.networks.pooling import global_average
from metamixer_ray.networks.resnet import bottleneck_resnet


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU and 3x3 convolution, twice; where the shape changes, the shortcut is a 1x1
    convolution."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut = (
            None if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        out = F.relu(self.bn2(self.conv1(activated)), inplace=True)
        return self.conv2(out) + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """``[B, 3, H, W] -> [B, classes]``; stage k gives 16, 32, 64 times ``width`` channels at 1/1, 1/2, 1/4
    size."""

    stage_names: ClassVar[tuple[str, ...]] = ("stage1", "stage2", "stage3")

    def __init__(self, *, depth: int, width: int, classes: int) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"the depth of a wide residual network is 6n + 4, not {depth}")
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)

        def group(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
            first = PreActivationBlock(channels_in, channels_out, stride)
            rest = [PreActivationBlock(channels_out, channels_out, 1) for _ in range((depth - 4) // 6 - 1)]
            return nn.Sequential(first, *rest)

        self.stage1 = group(16, 16 * width, 1)
        self.stage2 = group(16 * width, 32 * width, 2)
        self.stage3 = group(32 * width, 64 * width, 2)
        self.bn = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        out = self.stage3(self.stage2(self.stage1(self.conv(images))))
        return self.fc(global_average(F.relu(self.bn(out), inplace=True)))


def wide_resnet(classes: int, *, depth: int, width: int) -> WideResNet:
    """WRN-``depth``-``width``."""
    return WideResNet(depth=depth, width=width, classes=classes)


_SIZES = ((16, 1), (16, 2), (16, 4), (16, 8), (22, 8), (28, 2), (28, 4), (28, 10), (40, 1), (40, 2), (40, 4))

WIDE_RESNETS: Mapping[str, Callable[[int], nn.Module]] = {
    **{f"wrn{depth}-{width}": partial(wide_resnet, depth=depth, width=width) for depth, width in _SIZES},
    "wrn20-8": partial(bottleneck_resnet, blocks=2, widen=8),
}
