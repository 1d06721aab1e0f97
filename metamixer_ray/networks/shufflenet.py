"""ShuffleNetV2 for small images: Ma et al. 2018 (arXiv 1807.11164).

``shufflenetv2`` is the paper's 1x network with a first convolution of stride 1 and no max-pooling (1.26M
parameters for 10 classes). torchvision's network for 224 px is ``shufflenet_v2_x1_0``.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamixer_ray.networks.initialisation import initialise
from metamixer_ray.networks.pooling import global_average


def shuffle_channels(x: Tensor) -> Tensor:
    """Interleave the two halves of the channels of ``[B, C, H, W]``."""
    batch, channels, height, width = x.shape
    halves = x.reshape(batch, 2, channels // 2, height, width)
    return halves.transpose(1, 2).reshape(batch, channels, height, width)


def _convolutions(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_out, channels_out, 3, stride=stride, padding=1, groups=channels_out, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.Conv2d(channels_out, channels_out, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class Unit(nn.Module):
    """Half of the channels passes by, half is convolved; then they are shuffled (figure 3c)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _convolutions(channels // 2, channels // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        return shuffle_channels(torch.cat([kept, self.branch(changed)], dim=1))


class DownUnit(nn.Module):
    """Two branches of stride 2 on all channels, joined and shuffled (figure 3d)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        half = channels_out // 2
        self.bypass = nn.Sequential(
            nn.Conv2d(channels_in, channels_in, 3, stride=2, padding=1, groups=channels_in, bias=False),
            nn.BatchNorm2d(channels_in),
            nn.Conv2d(channels_in, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )
        self.branch = _convolutions(channels_in, half, 2)

    def forward(self, x: Tensor) -> Tensor:
        return shuffle_channels(torch.cat([self.bypass(x), self.branch(x)], dim=1))


class ShuffleNetV2(nn.Module):
    """``[B, 3, H, W] -> [B, classes]``; stages of 116, 232 and 464 channels at 1/2, 1/4 and 1/8 of the
    size."""

    stage_names: ClassVar[tuple[str, ...]] = ("stage1", "stage2", "stage3")

    def __init__(self, *, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)

        def stage(channels_in: int, channels_out: int, units: int) -> nn.Sequential:
            return nn.Sequential(DownUnit(channels_in, channels_out), *[Unit(channels_out) for _ in range(units)])

        self.stage1 = stage(24, 116, 3)
        self.stage2 = stage(116, 232, 7)
        self.stage3 = stage(232, 464, 3)
        self.conv2 = nn.Conv2d(464, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.fc = nn.Linear(1024, classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(images)), inplace=True)
        out = self.stage3(self.stage2(self.stage1(out)))
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return self.fc(global_average(out))


def shufflenetv2(classes: int) -> ShuffleNetV2:
    """ShuffleNetV2 1x for small images."""
    return ShuffleNetV2(classes=classes)


SHUFFLENETS: Mapping[str, Callable[[int], nn.Module]] = {"shufflenetv2": shufflenetv2}
