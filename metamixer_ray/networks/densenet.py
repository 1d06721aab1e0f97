"""DenseNet for small images: Huang et al. 2017 (arXiv 1608.06993), the plain form, without bottleneck or
compression.

``densenet40-12`` has 40 layers, growth 12 and 1.0M parameters (10 classes).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamixer_ray.networks.initialisation import initialise
from metamixer_ray.networks.pooling import global_average


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution; gives its input with ``growth`` new channels behind it."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.bn(x), inplace=True))], dim=1)


class Transition(nn.Module):
    """BatchNorm, ReLU, 1x1 convolution of as many channels, 2x2 average pooling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x), inplace=True)), 2)


class DenseNet(nn.Module):
    """Three dense blocks of (depth - 4) / 3 layers; ``[B, 3, H, W] -> [B, classes]``, H, W >= 4."""

    stage_names: ClassVar[tuple[str, ...]] = ("stage1", "stage2", "stage3")
    minimum_image_size: ClassVar[int] = 4

    def __init__(self, *, depth: int, growth: int, classes: int) -> None:
        super().__init__()
        layers = (depth - 4) // 3

        def block(channels: int) -> nn.Sequential:
            return nn.Sequential(*[DenseLayer(channels + i * growth, growth) for i in range(layers)])

        channels = [16 + i * layers * growth for i in range(4)]
        self.conv = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.stage1 = block(channels[0])
        self.transition1 = Transition(channels[1])
        self.stage2 = block(channels[1])
        self.transition2 = Transition(channels[2])
        self.stage3 = block(channels[2])
        self.bn = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        out = self.transition1(self.stage1(self.conv(images)))
        out = self.stage3(self.transition2(self.stage2(out)))
        return self.fc(global_average(F.relu(self.bn(out), inplace=True)))


def densenet(classes: int, *, depth: int, growth: int) -> DenseNet:
    """DenseNet-``depth``-``growth``."""
    return DenseNet(depth=depth, growth=growth, classes=classes)


DENSENETS: Mapping[str, Callable[[int], nn.Module]] = {
    "densenet40-12": partial(densenet, depth=40, growth=12),
}
