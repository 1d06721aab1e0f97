"""DenseNet for small images: Huang et al. 2017 (arXiv 1608.06993).

``densenet40-12`` is the plain form, without bottleneck or compression: 40 layers, growth 12 and 1.0M
parameters (10 classes).

``densenet40-12-okd`` is what the public code of OKDDip, PCL and MCL-OKD builds under the name
DenseNet-40-12: the paper's DenseNet-BC of 40 layers, with bottlenecks of 4 * 12 channels and transitions
that halve the channels (0.2M parameters). Compare published numbers with this one.
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


class BottleneckLayer(nn.Module):
    """A dense layer (DenseNet-B) with a 1x1 convolution to 4 * ``growth`` channels, BatchNorm and ReLU before the 3x3
    one."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = self.conv1(F.relu(self.bn1(x), inplace=True))
        return torch.cat([x, self.conv2(F.relu(self.bn2(squeezed), inplace=True))], dim=1)


class Transition(nn.Module):
    """BatchNorm, ReLU, 1x1 convolution, 2x2 average pooling."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels_in)
        self.conv = nn.Conv2d(channels_in, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x), inplace=True)), 2)


class DenseNet(nn.Module):
    """Three dense blocks; ``[B, 3, H, W] -> [B, classes]``, H, W >= 4.

    Args:
        compact: DenseNet-BC, with bottlenecks and halving transitions, (depth - 4) / 6 layers a block and a first
            convolution of 2 * ``growth`` channels; else (depth - 4) / 3 layers and 16 channels.
    """

    stage_names: ClassVar[tuple[str, ...]] = ("stage1", "stage2", "stage3")
    minimum_image_size: ClassVar[int] = 4

    def __init__(self, *, depth: int, growth: int, classes: int, compact: bool = False) -> None:
        super().__init__()
        layers = (depth - 4) // (6 if compact else 3)
        layer = BottleneckLayer if compact else DenseLayer

        def block(channels: int) -> nn.Sequential:
            return nn.Sequential(*[layer(channels + i * growth, growth) for i in range(layers)])

        channels = [2 * growth if compact else 16]
        grown = []
        for _ in range(3):
            grown.append(channels[-1] + layers * growth)
            channels.append(grown[-1] // 2 if compact else grown[-1])
        self.conv = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.stage1 = block(channels[0])
        self.transition1 = Transition(grown[0], channels[1])
        self.stage2 = block(channels[1])
        self.transition2 = Transition(grown[1], channels[2])
        self.stage3 = block(channels[2])
        self.bn = nn.BatchNorm2d(grown[2])
        self.fc = nn.Linear(grown[2], classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        out = self.transition1(self.stage1(self.conv(images)))
        out = self.stage3(self.transition2(self.stage2(out)))
        return self.fc(global_average(F.relu(self.bn(out), inplace=True)))


def densenet(classes: int, *, depth: int, growth: int, compact: bool = False) -> DenseNet:
    """DenseNet-``depth``-``growth``, or DenseNet-BC of that size."""
    return DenseNet(depth=depth, growth=growth, classes=classes, compact=compact)


DENSENETS: Mapping[str, Callable[[int], nn.Module]] = {
    "densenet40-12": partial(densenet, depth=40, growth=12),
    "densenet40-12-okd": partial(densenet, depth=40, growth=12, compact=True),
}
