"""MobileNetV2 for small images: Sandler et al. 2018 (arXiv 1801.04381).

``mobilenetv2`` has the form that small-image studies use: the first two strides are 1, and blocks of stride
1 that change the channel count have a 1x1 convolution and BatchNorm as their shortcut (2.3M parameters for
10 classes; the paper's have none, which would be 2.2M). torchvision's network for 224 px is
``mobilenet_v2``.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from metamixer_ray.networks.initialisation import initialise
from metamixer_ray.networks.pooling import global_average
from metamixer_ray.networks.resnet import projection_shortcut

_STAGES = (
    # (expansion, channels, blocks, stride) of the paper's table 2, gathered by resolution.
    ((1, 16, 1, 1), (6, 24, 2, 1)),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a shortcut where the stride is 1."""

    def __init__(self, channels_in: int, channels_out: int, expansion: int, stride: int) -> None:
        super().__init__()
        middle = channels_in * expansion
        self.conv1 = nn.Conv2d(channels_in, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride=stride, padding=1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module | None = None
        if stride == 1:
            same = channels_in == channels_out
            self.shortcut = nn.Identity() if same else projection_shortcut(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu6(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return out if self.shortcut is None else out + self.shortcut(x)


class MobileNetV2(nn.Module):
    """``[B, 3, H, W] -> [B, classes]``; stages of 24, 32, 96 and 320 channels at 1/1, 1/2, 1/4 and 1/8 of
    the size."""

    stage_names: ClassVar[tuple[str, ...]] = ("stage1", "stage2", "stage3", "stage4")

    def __init__(self, *, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        channels = 32
        for name, groups in zip(self.stage_names, _STAGES, strict=True):
            blocks = []
            for expansion, channels_out, count, first_stride in groups:
                for stride in [first_stride] + [1] * (count - 1):
                    blocks.append(InvertedResidual(channels, channels_out, expansion, stride))
                    channels = channels_out
            self.add_module(name, nn.Sequential(*blocks))
        self.conv2 = nn.Conv2d(channels, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.fc = nn.Linear(1280, classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu6(self.bn1(self.conv1(images)), inplace=True)
        for name in self.stage_names:
            out = self.get_submodule(name)(out)
        out = F.relu6(self.bn2(self.conv2(out)), inplace=True)
        return self.fc(global_average(out))


def mobilenetv2(classes: int) -> MobileNetV2:
    """MobileNetV2 of width 1 for small images."""
    return MobileNetV2(classes=classes)


MOBILENETS: Mapping[str, Callable[[int], nn.Module]] = {"mobilenetv2": mobilenetv2}
