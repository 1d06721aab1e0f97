"""VGG with BatchNorm for small images: Simonyan and Zisserman 2015 (arXiv 1409.1556), configurations A, B,
D and E.

``vgg16-cifar`` and its kin have the usual head of small images, one linear layer 512 -> classes (14.7M
parameters for 10 classes); ``vgg16-okd`` has the head of three linear layers, 512 -> 512 -> 512 -> classes,
that the public code of OKDDip and PCL has (15.3M). torchvision's ``vgg16`` and ``vgg16_bn`` are other
networks: they are for 224 px and have a head of 120M parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from metamixer_ray.networks.initialisation import initialise
from metamixer_ray.networks.pooling import global_average

_CHANNELS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each ended by 2x2 max-pooling; ``[B, 3, H, W] -> [B, classes]``, H,
    W >= 32."""

    stage_names: ClassVar[tuple[str, ...]] = ("stage1", "stage2", "stage3", "stage4", "stage5")
    minimum_image_size: ClassVar[int] = 32

    def __init__(self, *, convolutions: Sequence[int], classes: int, hidden_layers: int = 0) -> None:
        super().__init__()
        channels_in = 3
        for stage, (channels, count) in enumerate(zip(_CHANNELS, convolutions, strict=True), start=1):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.BatchNorm2d(channels)]
                layers.append(nn.ReLU(inplace=True))
                channels_in = channels
            self.add_module(f"stage{stage}", nn.Sequential(*layers, nn.MaxPool2d(2)))
        hidden: list[nn.Module] = []
        for _ in range(hidden_layers):
            hidden += [nn.Linear(channels_in, channels_in), nn.ReLU(inplace=True)]
        self.head = nn.Sequential(*hidden, nn.Linear(channels_in, classes))
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        out = images
        for name in self.stage_names:
            out = self.get_submodule(name)(out)
        return self.head(global_average(out))


def vgg(classes: int, *, depth: int, hidden_layers: int = 0) -> VGG:
    """VGG-``depth`` with BatchNorm and ``hidden_layers`` linear layers of 512 before the classifier."""
    return VGG(convolutions=_CONVOLUTIONS[depth], classes=classes, hidden_layers=hidden_layers)


VGGS: Mapping[str, Callable[[int], nn.Module]] = {
    **{f"vgg{depth}-cifar": partial(vgg, depth=depth) for depth in _CONVOLUTIONS},
    "vgg16-okd": partial(vgg, depth=16, hidden_layers=2),
}
