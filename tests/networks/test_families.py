"""The small-image families are the published networks: their parameters, shapes and arithmetic."""

import pytest
import torch
from torch import nn

from metamixer_ray.networks import NetworkConfig, build_network
from metamixer_ray.networks.densenet import densenet
from metamixer_ray.networks.registry import SMALL_IMAGE_NETWORKS

# name, parameters for 10 and for 100 classes, the published millions (if any) and for how many classes
PARAMETERS = [
    ("resnet8", 75_290, 81_140, None, 10),
    ("resnet14", 172_506, 178_356, None, 10),
    ("resnet20", 269_722, 275_572, 0.27, 10),
    ("resnet32", 464_154, 470_004, 0.46, 10),
    ("resnet44", 658_586, 664_436, 0.66, 10),
    ("resnet56", 853_018, 858_868, 0.85, 10),
    ("resnet110", 1_727_962, 1_733_812, 1.7, 10),
    ("resnet32-okd", 466_906, 472_756, None, 100),
    ("resnet110-okd", 1_147_738, 1_170_868, None, 100),
    ("wrn16-1", 175_066, 180_916, None, 10),
    ("wrn16-2", 691_674, 703_284, 0.7, 10),
    ("wrn16-4", 2_748_890, 2_772_020, None, 10),
    ("wrn16-8", 10_961_370, 11_007_540, 11.0, 10),
    ("wrn20-8", 6_848_090, 6_871_220, None, 100),
    ("wrn22-8", 17_158_106, 17_204_276, 17.2, 10),
    ("wrn28-2", 1_467_610, 1_479_220, None, 10),
    ("wrn28-4", 5_849_050, 5_872_180, None, 10),
    ("wrn28-10", 36_479_194, 36_536_884, 36.5, 10),
    ("wrn40-1", 563_930, 569_780, 0.6, 10),
    ("wrn40-2", 2_243_546, 2_255_156, 2.2, 10),
    ("wrn40-4", 8_949_210, 8_972_340, 8.9, 10),
    ("vgg11-cifar", 9_231_114, 9_277_284, None, 10),
    ("vgg13-cifar", 9_416_010, 9_462_180, None, 10),
    ("vgg16-cifar", 14_728_266, 14_774_436, 14.7, 10),
    ("vgg19-cifar", 20_040_522, 20_086_692, None, 10),
    ("vgg16-okd", 15_253_578, 15_299_748, 15.3, 100),
    ("densenet40-12", 1_019_722, 1_060_132, 1.0, 10),
    ("densenet40-12-okd", 176_122, 188_092, None, 10),
    ("mobilenetv2", 2_296_922, 2_412_212, 2.3, 10),
    ("shufflenetv2", 1_263_854, 1_356_104, 1.26, 10),
]
FAMILIES = ("resnet8", "resnet32-okd", "wrn16-1", "wrn20-8", "vgg11-cifar", "vgg16-okd")
FAMILIES += ("densenet40-12", "densenet40-12-okd", "mobilenetv2", "shufflenetv2")


def build(name: str, *, classes: int = 10, image_size: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return build_network(name, classes=classes, image_size=image_size, config=NetworkConfig())


def parameters(name: str, classes: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in SMALL_IMAGE_NETWORKS[name](classes).parameters())


@pytest.mark.parametrize(("name", "ten", "hundred", "published", "published_classes"), PARAMETERS)
def test_parameter_counts(name: str, ten: int, hundred: int, published: float | None, published_classes: int) -> None:
    assert parameters(name, 10) == ten
    assert parameters(name, 100) == hundred
    if published is not None:
        count = {10: ten, 100: hundred}[published_classes] / 1e6
        digits = len(str(published).partition(".")[2])
        assert abs(count - published) < 10**-digits, "more than one unit of the last published digit away"


@pytest.mark.parametrize(("depth", "growth", "published"), [(100, 12, 0.8), (250, 24, 15.3), (190, 40, 25.6)])
def test_compact_densenets_have_the_published_size(depth: int, growth: int, published: float) -> None:
    with torch.device("meta"):
        network = densenet(10, depth=depth, growth=growth, compact=True)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == published


def test_every_network_has_its_count_tested() -> None:
    assert {row[0] for row in PARAMETERS} == set(SMALL_IMAGE_NETWORKS)


@pytest.mark.parametrize(
    ("name", "image_size", "shapes"),
    [
        ("resnet8", 32, [(16, 32, 32), (32, 16, 16), (64, 8, 8)]),
        ("resnet8", 16, [(16, 16, 16), (32, 8, 8), (64, 4, 4)]),
        ("resnet8", 8, [(16, 8, 8), (32, 4, 4), (64, 2, 2)]),
        ("resnet110-okd", 8, [(64, 8, 8), (128, 4, 4), (256, 2, 2)]),
        ("wrn16-2", 32, [(32, 32, 32), (64, 16, 16), (128, 8, 8)]),
        ("vgg11-cifar", 32, [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512, 1, 1)]),
        ("densenet40-12", 32, [(160, 32, 32), (304, 16, 16), (448, 8, 8)]),
        ("densenet40-12-okd", 32, [(96, 32, 32), (120, 16, 16), (132, 8, 8)]),
        ("mobilenetv2", 32, [(24, 32, 32), (32, 16, 16), (96, 8, 8), (320, 4, 4)]),
        ("mobilenetv2", 16, [(24, 16, 16), (32, 8, 8), (96, 4, 4), (320, 2, 2)]),
        ("shufflenetv2", 32, [(116, 16, 16), (232, 8, 8), (464, 4, 4)]),
        ("shufflenetv2", 16, [(116, 8, 8), (232, 4, 4), (464, 2, 2)]),
    ],
)
def test_shapes(name: str, image_size: int, shapes: list[tuple[int, ...]]) -> None:
    network = build(name, classes=7, image_size=image_size).eval()
    seen: dict[int, tuple[int, ...]] = {}

    def look(stage: int):
        return lambda features: seen.update({stage: tuple(features.shape)}) or features

    with torch.no_grad():
        logits = network(torch.rand(3, 3, image_size, image_size), {k: look(k) for k in range(1, len(shapes) + 1)})
    assert logits.shape == (3, 7)
    assert [seen[k] for k in sorted(seen)] == [(3, *shape) for shape in shapes]
    assert network.layouts == ("BCHW",) * len(shapes)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_deterministic(name: str) -> None:
    network = build(name)
    images = torch.rand(4, 3, 32, 32)
    runs = [torch.autograd.grad(network(images).square().sum(), list(network.parameters())) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_channels_last_gives_the_same(name: str) -> None:
    network = build(name).double().eval()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        logits = network(images)
        network.to(memory_format=torch.channels_last)
        torch.testing.assert_close(network(images.contiguous(memory_format=torch.channels_last)), logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_seed_is_the_network(name: str) -> None:
    first, second = build(name).state_dict(), build(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_he_normal_initialisation() -> None:
    network = build("wrn16-4")
    weight = network.get_parameter("network.stage3.1.conv2.weight")
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=1e-3)
    depthwise = build("mobilenetv2").get_parameter("network.stage4.1.conv2.weight")
    assert depthwise.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)


def test_option_a_shortcut_halves_and_pads() -> None:
    block = build("resnet8").get_submodule("network.stage2.0.shortcut")
    x = torch.rand(2, 16, 6, 6)
    out = block(x)
    assert out.shape == (2, 32, 3, 3)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_small_batches_train_at_the_smallest_size() -> None:
    for name, size in (("vgg11-cifar", 32), ("shufflenetv2", 8), ("densenet40-12", 4)):
        network = build(name, image_size=size)
        network(torch.rand(2, 3, size, size)).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
