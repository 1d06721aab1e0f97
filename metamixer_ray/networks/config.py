"""The options of the room."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """How networks are built; which networks there are is the peers' business (``--peers``)."""

    small_stem: Literal["auto", "yes", "no"] = "auto"
    """Give torchvision networks a 3x3 stride-1 first convolution without max-pooling: auto does so for
    images of up to 64 px. Families without such a stem (VGG, ViT, Swin, ConvNeXt) keep their own."""

    stage_names: tuple[str, ...] | None = None
    """Sub-modules that end a stage, in the order they run, such as layer1.2. Replaces the stages that a
    network declares or that are found; NETWORK/SUBMODULE applies to the peers of that name only."""
