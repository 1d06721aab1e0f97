"""Weight initialisation that all small-image families share."""

import math

from torch import nn


def initialise(network: nn.Module) -> None:
    """He normal weights for convolutions, unit scales for BatchNorm, zero biases, all in place.

    The standard deviation is ``sqrt(2 / fan_out)`` (He et al. 2015, arXiv 1502.01852, equation 14), where
    the fan counts the outputs that one input channel reaches: grouped convolutions divide it by their
    groups. Linear weights keep PyTorch's default. Draws from torch's global generator.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
