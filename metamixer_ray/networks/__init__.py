"""Networks that learn: ``[B, 3, H, W]`` images in, ``[B, C]`` logits out, with named stages between.

:func:`build_network` makes one by name: the small-image families of the online-KD papers (ResNet, wide
ResNet, VGG, DenseNet, MobileNetV2, ShuffleNetV2), any torchvision classifier, or the user's own
``module:function``. What comes back is a :class:`StagedNetwork`, whose ``forward`` takes *taps*: functions
of what flows between two stages. Mixing and feature statistics are taps; the networks know of neither.

Names that look alike are different networks: ``mobilenetv2``, ``shufflenetv2``, ``vgg16-cifar`` and
``resnet20`` are small-image networks of this package; ``mobilenet_v2``, ``shufflenet_v2_x1_0``, ``vgg16``,
``vgg16_bn`` and ``resnet18`` are torchvision's. Names that end in ``-okd``, and ``wrn20-8``, are what the
public code of online-KD papers builds.
"""

from metamixer_ray.networks.config import NetworkConfig
from metamixer_ray.networks.probe import embedding_width
from metamixer_ray.networks.registry import build_network, network_names
from metamixer_ray.networks.staged import Layout, StagedNetwork, Tap, common_stages
from metamixer_ray.networks.taps import join_taps, keep_features

__all__ = [
    "Layout",
    "NetworkConfig",
    "StagedNetwork",
    "Tap",
    "build_network",
    "common_stages",
    "embedding_width",
    "join_taps",
    "keep_features",
    "network_names",
]
