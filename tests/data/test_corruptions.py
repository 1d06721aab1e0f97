"""Corruptions spoil images as they say, and the same image always alike."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from metamixer_ray.data.corruptions import Corruption, common_corruptions, severity_of

CORRUPTIONS = {corruption.name: corruption for corruption in common_corruptions(32)}


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(256, (6, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.mark.parametrize("corruption", CORRUPTIONS.values(), ids=lambda c: c.name)
def test_an_image_is_spoilt_alike_in_any_batch(corruption: Corruption, images: Tensor) -> None:
    indices, before = torch.tensor([5, 0, 9, 2, 7, 1]), images.clone()
    state = torch.get_rng_state()
    spoilt = corruption.apply(images, indices)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, before)
    assert (spoilt.dtype, spoilt.shape) == (torch.uint8, images.shape)
    assert not torch.equal(spoilt, images)
    # A batch whose images are all bad is empty.
    assert corruption.apply(images[:0], indices[:0]).shape == (0, 3, 32, 32)
    alone = torch.cat([corruption.apply(images[i : i + 1], indices[i : i + 1]) for i in (3, 1)])
    assert torch.equal(alone, spoilt[[3, 1]])


def test_noise_is_as_strong_as_it_says_and_every_image_has_its_own() -> None:
    grey = torch.full((40, 3, 32, 32), 128, dtype=torch.uint8)
    noise = CORRUPTIONS["noise"].apply(grey, torch.arange(40)).double() - 128
    # torchvision cuts off the fractions.
    drawn = np.trunc(np.random.default_rng(0).normal(0, 0.08 * 255, 10**5))
    assert noise.std() == pytest.approx(drawn.std(), rel=0.02)
    assert abs(noise.mean()) < 0.5
    flat = noise.flatten(1).numpy()
    assert np.abs(np.corrcoef(flat) - np.eye(40)).max() < 0.1


def test_contrast_shrinks_the_distance_from_the_grey_mean(images: Tensor) -> None:
    spoilt = CORRUPTIONS["contrast"].apply(images, torch.arange(6))
    for image, changed in zip(images.double(), spoilt.double(), strict=True):
        grey = (torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1) * image).sum(0).floor().mean()
        assert (0.4 * image + 0.6 * grey - changed).abs().max() <= 1


def test_blur_keeps_the_mean_and_mixes_neighbours(images: Tensor) -> None:
    spoilt = CORRUPTIONS["blur"].apply(images, torch.arange(6)).double()
    distances = np.arange(-3, 4)
    weights = np.exp(-(distances**2) / (2 * 0.7**2))
    weights /= weights.sum()
    window = images[0, 0, 10:17, 10:17].double().numpy()
    assert float(spoilt[0, 0, 13, 13]) == pytest.approx(weights @ window @ weights, abs=0.51)


def test_jpeg_is_near_what_pillow_makes_of_it(images: Tensor) -> None:
    spoilt = CORRUPTIONS["jpeg"].apply(images, torch.arange(6))
    buffer = io.BytesIO()
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=58)
    expected = np.asarray(Image.open(buffer)).astype(float)
    assert np.abs(spoilt[0].permute(1, 2, 0).numpy() - expected).mean() < 2


def test_large_images_are_spoilt_more_and_tiny_ones_can_be() -> None:
    assert (severity_of(64), severity_of(65)) == ("severity 3 of CIFAR-10-C", "severity 3 of ImageNet-C")
    assert [c.setting for c in common_corruptions(224)] != [c.setting for c in common_corruptions(32)]
    tiny = torch.randint(256, (2, 3, 2, 2), dtype=torch.uint8)
    for corruption in common_corruptions(2):
        assert corruption.apply(tiny, torch.arange(2)).shape == tiny.shape
