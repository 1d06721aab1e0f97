"""Channels last, from the images to the gradients: mixed memory formats make a step several times slower."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metamixer_ray.networks import NetworkConfig, build_network

WATCHED = ("threshold_backward", "native_batch_norm_backward", "add.Tensor", "convolution_backward")


class Formats(TorchDispatchMode):
    """Notes every watched operation that gets maps in another format than channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.strange: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if any(name in func.__name__ for name in WATCHED):
            # Maps of one pixel or one channel are in every format at once.
            maps = [a for a in args if isinstance(a, Tensor) and a.ndim == 4 and a.shape[1] > 1 and a.shape[2] > 1]
            self.seen += 1
            self.strange += [
                f"{func.__name__} {list(m.shape)} {m.stride()}"
                for m in maps
                if not m.is_contiguous(memory_format=torch.channels_last)
            ]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["resnet8", "resnet32-okd", "wrn16-2", "vgg16-cifar", "mobilenetv2"])
def test_maps_stay_channels_last_also_on_the_way_back(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(name, classes=10, image_size=32, config=NetworkConfig())
    network = network.to(memory_format=torch.channels_last).train()
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    network(images).sum().backward()
    with Formats() as formats:
        network(images).square().sum().backward()
    assert formats.seen > 10
    assert formats.strange == []
