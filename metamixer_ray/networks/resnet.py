"""ResNets for small images: He et al. 2016 (arXiv 1512.03385), section 4.2, and the variants of the
online-KD code.

``resnet8`` to ``resnet110`` are the paper's: a 3x3 convolution, three groups of n basic blocks of 16, 32
and 64 channels (depth 6n + 2), parameter-free *option A* shortcuts (strided identity, zero-padded
channels), which is what the published 0.27M (20), 0.46M (32), 0.66M (44), 0.85M (56) and 1.7M (110 layers,
10 classes) parameters belong to.

``resnet32-okd`` and ``resnet110-okd`` are what the public code of most online-KD papers (OKDDip, PCL,
MCL-OKD, L-MCL) builds under the names ResNet-32 and ResNet-110: *option B* shortcuts (1x1 convolution and
BatchNorm), and, for 110 layers, bottleneck blocks (12 in each group, 9n + 2) that end in 64, 128 and 256
channels. Compare published numbers with these.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from metamixer_ray.networks.initialisation import initialise
from metamixer_ray.networks.pooling import global_average


class ZeroPadShortcut(nn.Module):
    """Option A: every ``stride``-th pixel, and new channels that are zero, half of them on either side."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (channels_out - channels_in) // 2
        self.after = channels_out - channels_in - self.before

    def forward(self, x: Tensor) -> Tensor:
        # The same pixels as a strided slice, but pooling's gradient keeps channels last. A slice's doesn't, and every
        # block below would then work on two memory formats at once, several times slower.
        pixels = F.avg_pool2d(x, kernel_size=1, stride=self.stride)
        return F.pad(pixels, (0, 0, 0, 0, self.before, self.after))


def projection_shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    """Option B: a strided 1x1 convolution and BatchNorm."""
    conv = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out))


Shortcut = Callable[[int, int, int], nn.Module]
Block = Callable[[int, int, int, Shortcut], nn.Module]
"""``(channels in, channels out, stride, shortcut) -> block``."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, ReLU after the sum."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        same = channels_in == channels_out and stride == 1
        self.shortcut = nn.Identity() if same else shortcut(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided) and 1x1 convolutions and a shortcut; the middle has ``widen / 4`` of the outer
    channels."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, shortcut: Shortcut, *, widen: int = 1) -> None:
        super().__init__()
        middle = channels_out // 4 * widen
        self.conv1 = nn.Conv2d(channels_in, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        same = channels_in == channels_out and stride == 1
        self.shortcut = nn.Identity() if same else shortcut(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """Stem of 16 channels, three groups of ``blocks`` residual blocks each, global average, linear
    classifier.

    ``[B, 3, H, W] -> [B, classes]``; stage k gives ``channels[k - 1]`` channels at 1/1, 1/2 and 1/4 of the
    size.
    """

    stage_names: ClassVar[tuple[str, ...]] = ("stage1", "stage2", "stage3")

    def __init__(self, *, blocks: int, classes: int, block: Block, shortcut: Shortcut, channels: Sequence[int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)

        def group(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
            first = block(channels_in, channels_out, stride, shortcut)
            rest = [block(channels_out, channels_out, 1, shortcut) for _ in range(blocks - 1)]
            return nn.Sequential(first, *rest)

        self.stage1 = group(16, channels[0], 1)
        self.stage2 = group(channels[0], channels[1], 2)
        self.stage3 = group(channels[1], channels[2], 2)
        self.fc = nn.Linear(channels[2], classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn(self.conv(images)), inplace=True)
        out = self.stage3(self.stage2(self.stage1(out)))
        return self.fc(global_average(out))


def resnet(classes: int, *, depth: int) -> ResNet:
    """The paper's network of ``depth`` = 6n + 2 layers, with option A shortcuts."""
    return ResNet(
        blocks=(depth - 2) // 6,
        classes=classes,
        block=BasicBlock,
        shortcut=ZeroPadShortcut,
        channels=(16, 32, 64),
    )


def resnet32_okd(classes: int) -> ResNet:
    """ResNet-32 with option B shortcuts, as in the online-KD code."""
    return ResNet(blocks=5, classes=classes, block=BasicBlock, shortcut=projection_shortcut, channels=(16, 32, 64))


def bottleneck_resnet(classes: int, *, blocks: int, widen: int = 1) -> ResNet:
    """9 * ``blocks`` + 2 layers of bottlenecks that end in 64, 128 and 256 channels, with option B
    shortcuts."""
    return ResNet(
        blocks=blocks,
        classes=classes,
        block=partial(Bottleneck, widen=widen),
        shortcut=projection_shortcut,
        channels=(64, 128, 256),
    )


RESNETS: Mapping[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": partial(resnet, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet32-okd": resnet32_okd,
    "resnet110-okd": partial(bottleneck_resnet, blocks=12),
}
