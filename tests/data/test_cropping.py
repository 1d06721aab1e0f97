import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

from metamixer_ray.data import DataConfig
from metamixer_ray.data.augmentation import apply, draw
from metamixer_ray.data.cropping import (
    ASPECT,
    BOX_NUMBERS,
    Box,
    decode_box,
    evaluation_box,
    random_box,
    resize_box,
)
from metamixer_ray.data.sources import resolve_augment
from tests.data.drawing import encoded, picture


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Something smooth, as photographs are."""
    return picture(1, 6).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@given(width=st.integers(1, 2000), height=st.integers(1, 2000), seed=st.integers(0, 2**31))
def test_a_random_part_lies_inside_and_is_neither_small_nor_narrow(width: int, height: int, seed: int) -> None:
    box = random_box(np.random.default_rng(seed).random(BOX_NUMBERS), width, height)
    assert 0 <= box.left <= width - box.width
    assert 0 <= box.top <= height - box.height
    assert box.width >= 1
    assert box.height >= 1
    if min(width, height) > 100 and max(width, height) < 4 * min(width, height):
        assert 0.07 < box.width * box.height / (width * height) <= 1
        assert ASPECT[0] * 0.97 < box.width / box.height < ASPECT[1] * 1.03


def test_random_parts_are_distributed_as_torchvisions() -> None:
    image = torch.zeros(3, 375, 500, dtype=torch.uint8)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    rng = np.random.default_rng(0)
    boxes = [random_box(rng.random(BOX_NUMBERS), 500, 375) for _ in range(4000)]
    ours = np.array([[box.top, box.left, box.height, box.width] for box in boxes])
    assert np.abs(np.quantile(ours, [0.1, 0.5, 0.9], axis=0) - np.quantile(theirs, [0.1, 0.5, 0.9], axis=0)).max() < 12
    assert np.abs(ours.mean(axis=0) - theirs.mean(axis=0)).max() < 5


def test_a_part_is_what_torchvision_makes_of_it() -> None:
    image = torch.from_numpy(np.asarray(photo(90, 70)).copy()).permute(2, 0, 1)
    ours = resize_box(image, Box(11, 7, 60, 50), 32)
    theirs = v2.functional.resized_crop(image, 7, 11, 50, 60, [32, 32], antialias=True)
    assert ours.shape == (3, 32, 32)
    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_evaluation_is_the_usual_resize_and_centre_crop() -> None:
    image = torch.from_numpy(np.asarray(photo(500, 400)).copy()).permute(2, 0, 1)
    ours = resize_box(image, evaluation_box(500, 400), 224)
    theirs = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])(image)
    assert (ours.float() - theirs.float()).abs().mean() < 1
    assert evaluation_box(1, 1) == Box(0, 0, 1, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [400, 300, 150, 60])
def test_decoding_at_reduced_scale_shows_the_same(kind: str, mode: str, size: int) -> None:
    image = photo(1195, 901, mode)
    box = Box(240, 123, 791, 655)
    ours = decode_box(encoded(image, kind), lambda width, height: box, size)
    whole = torch.from_numpy(np.asarray(Image.open(io.BytesIO(encoded(image, kind))).convert("RGB")).copy())
    expected = resize_box(whole.permute(2, 0, 1), box, size)
    assert ours.shape == (3, size, size)
    assert (ours.float() - expected.float()).abs().mean() < 2


def test_cmyk_and_palette_images_are_read_as_elsewhere() -> None:
    for image, kind in ((photo(40, 30, "CMYK"), "JPEG"), (photo(40, 30).quantize(9), "PNG")):
        data = encoded(image, kind)
        ours = decode_box(data, lambda width, height: Box(0, 0, width, height), 20)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((20, 20), Image.Resampling.BILINEAR))
        assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - expected).mean() < 2


def test_broken_jpegs_raise() -> None:
    data = encoded(photo(60, 60), "JPEG")
    for broken in (b"", data[: len(data) // 2], data[:-2]):
        with pytest.raises((OSError, ValueError)):
            decode_box(broken, evaluation_box, 8)


def test_resized_crops_of_decoded_images() -> None:
    images = torch.from_numpy(np.stack([np.asarray(photo(24, 24)).transpose(2, 0, 1)] * 40))
    draws = draw("resized-crop", size=24, rows=40, seed=0, epoch=0, step=0)
    whole = apply(images, draws, "resized-crop")
    assert whole.shape == images.shape
    assert whole.dtype == torch.uint8
    parts = [apply(images[rows], draws.part(rows), "resized-crop") for rows in (slice(0, 20), slice(20, 40))]
    assert torch.equal(whole, torch.cat(parts))
    assert len({image.numpy().tobytes() for image in whole}) > 36
    row = int(np.flatnonzero(draws.mirrored)[0])
    box = random_box(draws.boxes[row], 24, 24)
    assert torch.equal(whole[row], resize_box(images[row], box, 24).flip(-1))


def test_what_auto_means() -> None:
    assert resolve_augment(DataConfig(data="digits"), streamed=False) == "crop"
    assert resolve_augment(DataConfig(data="x.parquet"), streamed=False) == "crop-flip"
    assert resolve_augment(DataConfig(data="x.parquet"), streamed=True) == "resized-crop"
    assert resolve_augment(DataConfig(augment="rand"), streamed=True) == "rand"
