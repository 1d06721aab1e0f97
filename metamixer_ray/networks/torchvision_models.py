"""Every torchvision classifier by its own name, with the stages of the families that have some.

| family | stages | features |
|---|---|---|
| resnet*, resnext*, wide_resnet* | layer1 to layer4 | [B, C, H, W] |
| regnet_* | trunk_output.block1 to block4 | [B, C, H, W] |
| shufflenet_v2_* | stage2 to stage4 | [B, C, H, W] |
| densenet* | features.denseblock1 to denseblock4 | [B, C, H, W] |
| mobilenet_v2, mobilenet_v3_*, efficientnet_* | the last block of each resolution | [B, C, H, W] |
| vgg* | the five max-poolings | [B, C, H, W] |
| convnext_* | features.1, 3, 5, 7 | [B, C, H, W] |
| swin_* | features.1, 3, 5, 7 | [B, H, W, C] |
| vit_* | every quarter of the encoder's layers | [B, 1 + N, C] |

A ViT's first token is the class token, the N = (H / patch) ** 2 others are the patches, row by row. For
other models (googlenet, inception_v3, mnasnet*, squeezenet*, alexnet, maxvit_t) the user names the stages
(``--stage-names``).
"""

from functools import cache
from typing import Any

from torch import nn

from metamixer_ray.errors import ConfigError
from metamixer_ray.networks.staged import Layout

SMALL_IMAGE = 64
"""Images of at most so many pixels get the small stem when ``--small-stem auto``."""

_RESNETS = ("resnet", "resnext", "wide_resnet")
_BY_RESOLUTION = ("mobilenet_v2", "mobilenet_v3", "efficientnet")


@cache
def torchvision_names() -> tuple[str, ...]:
    """The names of torchvision's classifiers, without detection, segmentation, video and quantised models."""
    # Imported where it is used: it takes a second, which every process of a run would wait for.
    import torchvision

    return tuple(sorted(torchvision.models.list_models(module=torchvision.models)))


def build_torchvision(name: str, *, classes: int, image_size: int, small_stem: bool) -> nn.Module:
    """torchvision's ``name``, not pretrained, for square images of ``image_size`` px.

    With ``small_stem`` the first convolution has stride 1 (3x3 if it was larger) and max-pooling right
    after it is gone, in the families that start so.

    Raises:
        ConfigError: the model can't be built for that image size.
    """
    options: dict[str, Any] = {"num_classes": classes}
    if name in ("googlenet", "inception_v3"):
        # The auxiliary heads would make the training output a tuple.
        options |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        patch = int(name.rsplit("_", 1)[1])
        if image_size % patch:
            raise ConfigError(
                f"--peers {name}: images of {image_size} px don't divide into patches of {patch} px; "
                f"set --image-size {max(patch, round(image_size / patch) * patch)}."
            )
        options["image_size"] = image_size
    if name.startswith("maxvit"):
        options["input_size"] = (image_size, image_size)
    try:
        import torchvision

        network = torchvision.models.get_model(name, weights=None, **options)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--peers {name}: torchvision can't build it for images of {image_size} px ({error}); "
            "choose another --image-size or another network."
        ) from error
    if small_stem:
        _shrink_stem(name, network)
    return network


def torchvision_stages(name: str, network: nn.Module) -> tuple[str, ...] | None:
    """The stages of torchvision's ``name``, None when they aren't known."""
    if name.startswith(_RESNETS):
        return tuple(f"layer{k}" for k in range(1, 5))
    if name.startswith("regnet"):
        return tuple(f"trunk_output.block{k}" for k in range(1, 5))
    if name.startswith("shufflenet_v2"):
        return tuple(f"stage{k}" for k in range(2, 5))
    if name.startswith("densenet"):
        return tuple(f"features.denseblock{k}" for k in range(1, 5))
    if name.startswith(("convnext", "swin")):
        return tuple(f"features.{k}" for k in (1, 3, 5, 7))
    if name.startswith("vgg"):
        features = network.get_submodule("features").named_children()
        return tuple(f"features.{child}" for child, module in features if isinstance(module, nn.MaxPool2d))
    if name.startswith(_BY_RESOLUTION):
        return _last_of_each_resolution(network.get_submodule("features"), "features")
    if name.startswith("vit_"):
        layers = [child for child, _ in network.get_submodule("encoder.layers").named_children()]
        return tuple(f"encoder.layers.{layers[len(layers) * k // 4 - 1]}" for k in range(1, 5))
    return None


def torchvision_layout(name: str) -> Layout | None:
    """The layout of the stages' outputs where their number of axes doesn't tell it."""
    return "BHWC" if name.startswith("swin") else None


def _last_of_each_resolution(features: nn.Module, prefix: str) -> tuple[str, ...]:
    """The children of a sequence after which the next one halves the resolution, and its last child."""
    children = list(features.named_children())
    halves = [
        any(isinstance(part, nn.Conv2d) and part.stride != (1, 1) for part in module.modules())
        for _, module in children
    ]
    last = len(children) - 1
    return tuple(f"{prefix}.{child}" for i, (child, _) in enumerate(children) if i == last or halves[i + 1])


def _shrink_stem(name: str, network: Any) -> None:
    if name.startswith(_RESNETS):
        network.conv1 = _three_by_three(network.conv1)
        network.maxpool = nn.Identity()
    elif name.startswith("densenet"):
        network.features.conv0 = _three_by_three(network.features.conv0)
        network.features.pool0 = nn.Identity()
    elif name.startswith("shufflenet_v2"):
        network.conv1[0].stride = (1, 1)
        network.maxpool = nn.Identity()
    elif name.startswith("regnet"):
        network.stem[0].stride = (1, 1)
    elif name.startswith(_BY_RESOLUTION):
        network.features[0][0].stride = (1, 1)


def _three_by_three(stem: nn.Conv2d) -> nn.Conv2d:
    conv = nn.Conv2d(stem.in_channels, stem.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
