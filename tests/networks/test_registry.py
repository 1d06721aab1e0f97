"""Networks by name, their stages in every family, and what goes wrong with names and sizes."""

import pytest
import torch
from torch import Tensor, nn

from metamixer_ray.errors import ConfigError
from metamixer_ray.networks import NetworkConfig, StagedNetwork, build_network, network_names
from metamixer_ray.networks.registry import SMALL_IMAGE_NETWORKS
from metamixer_ray.networks.torchvision_models import build_torchvision, torchvision_stages

STAGES = {
    "resnet8": 3,
    "resnet32-okd": 3,
    "wrn16-1": 3,
    "vgg11-cifar": 5,
    "densenet40-12": 3,
    "mobilenetv2": 4,
    "shufflenetv2": 3,
    "resnet18": 4,
    "mobilenet_v2": 5,
    "mobilenet_v3_small": 5,
    "efficientnet_b0": 5,
    "shufflenet_v2_x0_5": 3,
    "densenet121": 4,
    "regnet_x_400mf": 4,
    "convnext_tiny": 4,
    "vit_b_16": 4,
    "swin_t": 4,
    "swin_v2_t": 4,
}


def build(name: str, *, classes: int = 5, image_size: int = 32, **options: object) -> StagedNetwork:
    torch.manual_seed(0)
    return build_network(name, classes=classes, image_size=image_size, config=NetworkConfig(**options))


def awaken_head(network: nn.Module) -> None:
    """torchvision's ViT starts with a classifier of zeros, through which nothing shows."""
    for module in network.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight)


@pytest.mark.parametrize(("name", "count"), STAGES.items())
def test_taps_get_and_change_the_features_of_every_stage(name: str, count: int) -> None:
    network = build(name).eval()
    awaken_head(network)
    images = torch.rand(3, 3, 32, 32)
    seen: dict[int, Tensor] = {}

    def look(stage: int):
        def tap(features: Tensor) -> Tensor:
            features.retain_grad()
            seen[stage] = features
            return features

        return tap

    assert len(network.stage_names) == len(network.layouts) == count
    logits = network(images, {stage: look(stage) for stage in range(1, count + 1)})
    logits.square().sum().backward()
    # With gradients on: without them attention takes another path, equal only to rounding.
    assert torch.equal(logits, network(images)), "looking changes nothing"
    assert sorted(seen) == list(range(1, count + 1))
    for stage, features in seen.items():
        assert features.shape[0] == 3
        assert features.ndim == len(network.layouts[stage - 1])
        assert features.grad is not None
        assert features.grad.any(), f"no gradient reaches stage {stage}"
        changed = network(images, {stage: lambda x: x.roll(1, 0)})
        torch.testing.assert_close(changed, logits.roll(1, 0))
        assert not torch.equal(changed, logits), f"stage {stage} does not feed the logits"


@pytest.mark.parametrize(
    ("name", "image_size", "layout", "shapes"),
    [
        ("swin_t", 32, "BHWC", [(8, 8, 96), (4, 4, 192), (2, 2, 384), (1, 1, 768)]),
        ("swin_t", 64, "BHWC", [(16, 16, 96), (8, 8, 192), (4, 4, 384), (2, 2, 768)]),
        ("vit_b_16", 32, "BNC", [(5, 768)] * 4),
        ("vit_b_16", 48, "BNC", [(10, 768)] * 4),
        ("resnet18", 32, "BCHW", [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]),
        ("resnet18", 96, "BCHW", [(64, 24, 24), (128, 12, 12), (256, 6, 6), (512, 3, 3)]),
    ],
)
def test_shapes_and_layouts(name: str, image_size: int, layout: str, shapes: list[tuple[int, ...]]) -> None:
    network = build(name, image_size=image_size).eval()
    seen: list[tuple[int, ...]] = []
    with torch.no_grad():
        look = {k: lambda x: seen.append(tuple(x.shape)) or x for k in range(1, len(shapes) + 1)}
        network(torch.rand(2, 3, image_size, image_size), look)
    assert seen == [(2, *shape) for shape in shapes]
    assert network.layouts == (layout,) * len(shapes)


def test_vgg_stages_of_torchvision_are_its_poolings() -> None:
    with torch.device("meta"):
        network = build_torchvision("vgg11", classes=5, image_size=32, small_stem=True)
    assert torchvision_stages("vgg11", network) == tuple(f"features.{k}" for k in (2, 5, 10, 15, 20))


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("resnet18", "conv1"),
        ("densenet121", "features.conv0"),
        ("shufflenet_v2_x0_5", "conv1.0"),
        ("mobilenet_v3_small", "features.0.0"),
        ("regnet_x_400mf", "stem.0"),
    ],
)
def test_small_stem(name: str, stem: str) -> None:
    for small_stem, image_size, small in (("auto", 32, True), ("no", 32, False), ("yes", 72, True)):
        conv = build(name, image_size=image_size, small_stem=small_stem).network.get_submodule(stem)
        assert conv.stride == ((1, 1) if small else (2, 2))
        assert not small or conv.kernel_size == (3, 3)
    network = build(name, image_size=72).network
    assert network.get_submodule(stem).stride == (2, 2), "auto leaves large images the published stem"


def test_names() -> None:
    names = network_names()
    assert len(names) == len(set(names)), "no name means two networks"
    assert {"resnet20", "resnet18", "mobilenetv2", "mobilenet_v2", "vgg16", "vgg16-cifar", "swin_t"} <= set(names)
    assert set(SMALL_IMAGE_NETWORKS) <= set(names)
    assert not any("rcnn" in name or "quantized" in name for name in names)


def test_lookalikes_are_different_networks() -> None:
    assert type(build("mobilenetv2").network) is not type(build("mobilenet_v2").network)
    assert build("resnet20").stage_names == ("stage1", "stage2", "stage3")
    assert build("resnet18").stage_names == ("layer1", "layer2", "layer3", "layer4")


@pytest.mark.parametrize(("alias", "name"), [("wrn-16-1", "wrn16-1"), ("WRN_16_1", "wrn16-1"), ("ResNet-8", "resnet8")])
def test_other_spellings(alias: str, name: str) -> None:
    ours, theirs = build(alias).state_dict(), build(name).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("resnet23", "resnet20"),
        ("wrn16_3", "wrn16-"),
        ("mobilnetv2", "mobilenetv2"),
        ("swin", "swin_"),
        ("vgg16-cifr", "vgg16-cifar"),
    ],
)
def test_unknown_network(typo: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"--peers: there is no network '{typo}'. Did you mean .*{meant}"):
        build(typo)


def test_unknown_network_like_no_other() -> None:
    with pytest.raises(ConfigError, match=r"--peers: there is no network '\?'\. Names are"):
        build("?")


def test_images_too_small() -> None:
    with pytest.raises(ConfigError, match=r"--peers vgg11-cifar: .*at least 32 px.*--image-size 32"):
        build("vgg11-cifar", image_size=8)
    with pytest.raises(ConfigError, match=r"--peers densenet40-12: .*at least 4 px"):
        build("densenet40-12", image_size=3)
    with pytest.raises(ConfigError, match=r"--peers squeezenet1_1: images of 4 x 4 px.*larger --image-size"):
        build("squeezenet1_1", image_size=4, stage_names=("features.4",))
    with pytest.raises(ConfigError, match=r"--peers vit_b_32: images of 28 px.*--image-size 32"):
        build("vit_b_32", image_size=28)


def test_stage_names_replace_what_a_network_declares() -> None:
    network = build("resnet8", stage_names=("stage1.0", "stage2"))
    assert network.stage_names == ("stage1.0", "stage2")


def test_stage_names_for_one_of_the_peers() -> None:
    options = {"stage_names": ("resnet-8/stage1.0", "resnet8/stage3", "wrn16-1/stage2")}
    assert build("resnet8", **options).stage_names == ("stage1.0", "stage3")
    assert build("wrn16-1", **options).stage_names == ("stage2",)
    assert build("shufflenetv2", **options).stage_names == ("stage1", "stage2", "stage3")


def test_stage_names_for_a_peer_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"--stage-names rsnet8/stage1: there is no network 'rsnet8'.*resnet8"):
        build("resnet8", stage_names=("rsnet8/stage1",))


def test_torchvision_networks_without_known_stages() -> None:
    with pytest.raises(ConfigError, match=r"--peers squeezenet1_1: its stages aren't known.*--stage-names"):
        build("squeezenet1_1")
    network = build("squeezenet1_1", stage_names=("features.4", "features.7"))
    assert network.stage_names == ("features.4", "features.7")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("stage1", "stage7"), r"'stage7' is no sub-module"),
        (("stage2", "stage1"), r"run in the order stage1 stage2"),
        (("stage1", "stage1"), r"given twice"),
    ],
)
def test_stage_names_that_cannot_be(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"--stage-names.*{message}"):
        build("resnet8", stage_names=names)


def test_building_draws_no_more_than_the_weights() -> None:
    torch.manual_seed(0)
    SMALL_IMAGE_NETWORKS["resnet8"](5)
    drawn = torch.get_rng_state()
    network = build("resnet8")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(module.training for module in network.modules())
    assert network.network.bn.num_batches_tracked == 0
    assert not network.network.bn.running_mean.any()


def test_googlenet_trains_without_auxiliary_heads() -> None:
    network = build("googlenet", stage_names=("inception3b", "inception4e"))
    assert network.train()(torch.rand(2, 3, 32, 32)).shape == (2, 5)
