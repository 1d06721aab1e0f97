"""Images, features and targets hold what ``label_sources`` says, counted pixel by pixel."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from metamixer_ray.mixing import (
    GlobalMix,
    MixingConfig,
    MixPlan,
    label_sources,
    mix_features,
    mix_images,
    mix_targets,
)
from metamixer_ray.mixing.local_mixing import clipped_boxes
from tests.mixing.plans import drawn_plans, global_plan, local_mix, matrix, plan_of, quick


def identity_images(rows: int, height: int, width: int) -> Tensor:
    """[B, B, H, W]: channel s of row s is one, so a mixed pixel's channels are its weights of all rows."""
    return torch.eye(rows, dtype=torch.float64)[:, :, None, None].expand(-1, -1, height, width).contiguous()


def mixed_pixels(plan: MixPlan, height: int, width: int) -> Tensor:
    """Weights [B, B, H, W] of every row at every pixel, after the input and the tap."""
    return mix_features(mix_images(identity_images(plan.rows, height, width), plan), plan)


@given(drawn_plans())
@quick
def test_pixel_shares_equal_label_weights(drawn: tuple[MixPlan, int, int]) -> None:
    plan, height, width = drawn
    shares = mixed_pixels(plan, height, width).mean((2, 3))
    assert torch.allclose(shares, matrix(*label_sources(plan)), atol=1e-6)


@given(drawn_plans())
@quick
def test_every_pixel_is_a_convex_combination_of_its_sources(drawn: tuple[MixPlan, int, int]) -> None:
    plan, height, width = drawn
    weights = mixed_pixels(plan, height, width)
    assert (weights >= 0).all()
    assert torch.allclose(weights.sum(1), torch.ones(()).double(), atol=1e-6)
    # Nothing at all comes from rows that are no source.
    indices, label_weights = label_sources(plan)
    assert weights[matrix(indices, torch.ones_like(label_weights)) == 0].sum() == 0


@given(drawn_plans(), st.integers(0, 1000))
@quick
def test_mixed_images_stay_within_the_range_of_their_sources(drawn: tuple[MixPlan, int, int], seed: int) -> None:
    plan, height, width = drawn
    images = torch.randn(plan.rows, 3, height, width, generator=torch.Generator().manual_seed(seed))
    mixed = mix_features(mix_images(images, plan), plan)
    of_sources = images[label_sources(plan)[0]]
    if plan.local is not None and plan.local.resized:
        # A pixel of a scaled image comes from other places of it, so only the whole image's range bounds it.
        low, high = of_sources.amin((3, 4)), of_sources.amax((3, 4))
        of_sources = torch.cat((low, high), dim=1)[..., None, None]
    assert (mixed <= of_sources.amax(1) + 1e-5).all()
    assert (mixed >= of_sources.amin(1) - 1e-5).all()


@given(drawn_plans(), st.integers(1, 9))
@quick
def test_targets_are_the_mixing_matrix_times_the_one_hots(drawn: tuple[MixPlan, int, int], classes: int) -> None:
    plan = drawn[0]
    one_hot = torch.eye(classes)[torch.arange(plan.rows) * 7 % classes]
    targets = mix_targets(one_hot, plan)
    assert targets.dtype == torch.float32
    assert torch.allclose(targets.double(), matrix(*label_sources(plan)) @ one_hot.double(), atol=1e-6)
    assert torch.allclose(targets.sum(1), torch.ones(plan.rows), atol=1e-6)


def test_local_shares_counted_by_hand() -> None:
    height, width, rows = 9, 14, 16
    plan = plan_of(MixingConfig(mixer="cutmix", local_probability=1), rows=rows, height=height, width=width)
    assert plan.local is not None
    colours = torch.arange(rows, dtype=torch.float32)
    mixed = mix_images(colours[:, None, None, None].expand(rows, 3, height, width), plan)
    for row in range(rows):
        own = int((mixed[row, 0] == row).sum())
        partner = int(plan.local.partners[0, row])
        if partner != row:
            assert own + int((mixed[row, 0] == partner).sum()) == height * width
            assert plan.local.kept[row].item() == pytest.approx(own / (height * width), abs=1e-7)


def test_a_box_lies_where_it_says_and_is_exact() -> None:
    images = torch.randn(2, 3, 6, 20)
    boxes = np.array([[1, 12, 4, 19], [0, 0, 6, 20]])
    mixed = mix_images(images, MixPlan(2, local_mix(torch.tensor([1, 0]), boxes, height=6, width=20)))
    expected = images.clone()
    expected[0, :, 1:4, 12:19] = images[1, :, 1:4, 12:19]
    expected[1] = images[0]
    assert torch.equal(mixed, expected)


def test_an_empty_box_changes_nothing() -> None:
    images = torch.randn(2, 3, 4, 4)
    local = local_mix(torch.tensor([1, 0]), np.array([[2, 2, 2, 2], [0, 3, 0, 3]]), height=4, width=4)
    assert local.kept.tolist() == [1.0, 1.0]
    assert torch.equal(mix_images(images, MixPlan(2, local)), images)


@pytest.mark.parametrize(("height", "width"), [(8, 40), (40, 8)])
def test_height_and_width_are_not_swapped(height: int, width: int) -> None:
    config = MixingConfig(mixer="cutmix", local_probability=1)
    plan = plan_of(config, rows=2000, height=height, width=width)
    assert plan.local is not None
    top, left, bottom, right = plan.local.boxes[0].unbind(1)
    assert int(bottom.max()) == height
    assert int(right.max()) == width
    # Boxes have the image's proportions: mean sides relate as the image's do.
    sides = (bottom - top).double().mean() / (right - left).double().mean()
    assert sides.item() == pytest.approx(height / width, rel=0.25)


def test_boxes_by_hand() -> None:
    lam = np.array([0.75, 0.75, 1.0, 0.0])
    boxes = clipped_boxes(lam, np.array([10, 0, 5, 19]), np.array([20, 39, 5, 0]), height=20, width=40)
    # sqrt(1 - 0.75) = 1/2: half sides of 5 and 10 pixels.
    assert boxes.tolist() == [[5, 10, 15, 30], [0, 29, 5, 40], [5, 5, 5, 5], [9, 0, 20, 20]]


@pytest.mark.parametrize("shape", [(), (5,), (17, 6), (3, 4, 4)])
def test_interpolation_by_hand_for_features_of_any_shape(shape: tuple[int, ...]) -> None:
    plan = global_plan(8, stage=1)
    assert plan.glob is not None
    features = torch.randn(8, *shape)
    weight = plan.glob.kept.view(-1, *[1] * len(shape))
    expected = weight * features + (1 - weight) * features[plan.glob.partner]
    assert torch.allclose(mix_features(features, plan), expected, atol=1e-6)


def test_local_comes_before_global() -> None:
    """The global partner brings its own local box with it."""
    local = local_mix(torch.tensor([1, 0]), np.array([[0, 0, 2, 2], [0, 0, 4, 2]]), height=4, width=4)
    plan = MixPlan(2, local, GlobalMix(torch.tensor([1, 0]), torch.tensor([0.75, 0.5]), 0))
    shares = mix_images(identity_images(2, 4, 4), plan).mean((2, 3))
    # Row 0 keeps 3/4 of itself, row 1 half: 0.75 * (3/4, 1/4) + 0.25 * (1/2, 1/2), and 0.5 of each.
    assert torch.allclose(shares, torch.tensor([[0.6875, 0.3125], [0.625, 0.375]]).double())
