import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from metamixer_ray.data.augmentation import (
    OPERATIONS,
    apply,
    crop_and_flip,
    draw,
    padding,
)
from metamixer_ray.data.config import Augment
from metamixer_ray.data.operations import operate

ALL: tuple[Augment, ...] = ("none", "crop", "crop-flip", "trivial", "rand")


def images(count: int = 16, size: int = 16) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(1, 256, (count, 3, size, size), dtype=np.uint8))


@pytest.mark.parametrize("augment", ALL)
def test_two_replicas_see_what_one_would(augment: Augment) -> None:
    batch = images()
    draws = draw(augment, size=16, rows=16, seed=1, epoch=2, step=3)
    whole = apply(batch.clone(), draws, augment)
    halves = [apply(batch[rows].clone(), draws.part(rows), augment) for rows in (slice(0, 8), slice(8, 16))]
    assert whole.dtype == torch.uint8
    assert whole.shape == batch.shape
    assert torch.equal(whole, torch.cat(halves))


@pytest.mark.parametrize("augment", ALL[1:])
def test_it_is_a_pure_function_of_seed_epoch_and_step(augment: Augment) -> None:
    def result(seed: int, epoch: int, step: int) -> torch.Tensor:
        return apply(images(), draw(augment, size=16, rows=16, seed=seed, epoch=epoch, step=step), augment)

    state = torch.get_rng_state()
    assert torch.equal(result(0, 0, 0), result(0, 0, 0))
    assert not torch.equal(result(0, 0, 0), result(1, 0, 0))
    assert not torch.equal(result(0, 0, 0), result(0, 1, 0))
    assert not torch.equal(result(0, 0, 0), result(0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_crop_and_flip_match_a_plain_loop() -> None:
    batch, pad = images(32, 12), padding(12)
    draws = draw("crop-flip", size=12, rows=32, seed=0, epoch=0, step=0)
    result = crop_and_flip(batch, draws)
    for row, image in enumerate(batch):
        padded = torch.zeros(3, 12 + 2 * pad, 12 + 2 * pad, dtype=torch.uint8)
        padded[:, pad : pad + 12, pad : pad + 12] = image
        down, right = draws.down[row], draws.right[row]
        expected = padded[:, down : down + 12, right : right + 12]
        if draws.mirrored[row]:
            expected = expected.flip(-1)
        assert torch.equal(result[row], expected)
    assert draws.mirrored.any()
    assert not draws.mirrored.all()


def test_crops_reach_every_offset_and_plain_crop_never_mirrors() -> None:
    draws = draw("crop", size=32, rows=4000, seed=0, epoch=0, step=0)
    assert padding(32) == 4
    assert set(draws.down) == set(draws.right) == set(range(9))
    assert not draws.mirrored.any()
    assert padding(8) == 1


def test_none_leaves_images_alone() -> None:
    batch = images()
    assert torch.equal(apply(batch, draw("none", size=16, rows=16, seed=0, epoch=0, step=0), "none"), batch)


def test_trivial_draws_one_operation_of_any_strength_and_rand_two_of_one() -> None:
    trivial = draw("trivial", size=16, rows=5000, seed=0, epoch=0, step=0)
    assert set(trivial.operations[:, 0]) == set(range(len(OPERATIONS)))
    assert set(trivial.bins[:, 0]) == set(range(31))
    assert set(trivial.signs[:, 0]) == {-1, 1}
    rand = draw("rand", size=16, rows=50, seed=0, epoch=0, step=0)
    assert rand.operations.shape == (50, 2)
    assert set(rand.bins.ravel()) == {9}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_shape_and_type_and_all_but_identity_change_the_image(name: str) -> None:
    image = images(1)[0] // 2 + 20
    strength = {"posterize": 3.0, "solarize": 60.0, "rotate": 40.0, "translate-x": 4.0, "translate-y": 4.0}
    result = operate(image, name, strength.get(name, 0.5))
    assert result.dtype == torch.uint8
    assert result.shape == image.shape
    assert torch.equal(result, image) == (name == "identity")


@pytest.mark.parametrize("augment", ["trivial", "rand"])
def test_operations_and_strengths_are_torchvisions(augment: str) -> None:
    """Our table of strengths against torchvision's own, operation by operation."""
    from metamixer_ray.data import augmentation

    reference = v2.TrivialAugmentWide() if augment == "trivial" else v2.RandAugment()
    ours = augmentation.STRENGTHS[augment]
    theirs = {
        "shear-x": "ShearX",
        "shear-y": "ShearY",
        "translate-x": "TranslateX",
        "translate-y": "TranslateY",
        "rotate": "Rotate",
        "brightness": "Brightness",
        "color": "Color",
        "contrast": "Contrast",
        "sharpness": "Sharpness",
        "posterize": "Posterize",
        "solarize": "Solarize",
    }
    assert set(reference._AUGMENTATION_SPACE) == {*theirs.values(), "Identity", "AutoContrast", "Equalize"}
    for name, their_name in theirs.items():
        magnitudes = reference._AUGMENTATION_SPACE[their_name][0](31, 32, 32)
        scale = 255 if name == "solarize" else 1
        for bin_ in range(31):
            assert ours(name, bin_, 32) == pytest.approx(float(magnitudes[bin_]) * scale, abs=1e-4), (
                name,
                bin_,
            )
