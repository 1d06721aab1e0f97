"""Cut^nMix and ResizeMix: several boxes over each other, and whole images scaled into a box."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from metamixer_ray.mixing import MixingConfig, MixPlan, mix_images
from metamixer_ray.mixing.local_mixing import local_mix, visible_shares
from metamixer_ray.mixing.resizing import scale_into_boxes
from tests.mixing.plans import plan_of, quick

LAYOUTS = (torch.contiguous_format, torch.channels_last)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 13), st.integers(1, 13))
@quick
def test_shares_equal_those_counted_on_a_canvas(seed: int, count: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    sides = [np.sort(rng.integers(0, size + 1, (count, 3, 2)), axis=2) for size in (height, width)]
    boxes = np.stack((sides[0][..., 0], sides[1][..., 0], sides[0][..., 1], sides[1][..., 1]), axis=2)
    shares = visible_shares(boxes, height=height, width=width)
    for row in range(3):
        canvas = np.zeros((height, width), dtype=np.int64)
        for n in range(count):
            top, left, bottom, right = boxes[n, row]
            canvas[top:bottom, left:right] = n + 1
        counted = np.bincount(canvas.ravel(), minlength=count + 1) / canvas.size
        assert shares[:, row] == pytest.approx(counted, abs=1e-6)


def test_later_boxes_lie_over_earlier_ones_and_show_images_as_they_were() -> None:
    images = torch.randn(3, 3, 6, 8)
    partners = torch.tensor([[1, 2, 0], [2, 0, 1]])
    boxes = np.array([[[0, 0, 4, 4]] * 3, [[2, 2, 6, 6]] * 3])
    mixed = mix_images(images, MixPlan(3, local_mix(partners, boxes, height=6, width=8)))
    for row in range(3):
        expected = images[row].clone()
        expected[:, 0:4, 0:4] = images[partners[0, row], :, 0:4, 0:4]
        expected[:, 2:6, 2:6] = images[partners[1, row], :, 2:6, 2:6]
        assert torch.equal(mixed[row], expected)


def test_one_cut_is_cutmix() -> None:
    cutmix, once = (
        plan_of(MixingConfig(mixer=mixer, cuts=1, local_probability=1), rows=32)  # type: ignore[arg-type]
        for mixer in ("cutmix", "cutnmix")
    )
    assert cutmix.local is not None
    assert once.local is not None
    assert torch.equal(cutmix.local.boxes, once.local.boxes)
    assert torch.equal(cutmix.local.partners, once.local.partners)
    assert torch.equal(cutmix.local.weights, once.local.weights)


def test_more_cuts_leave_less_of_an_image_and_show_more_others() -> None:
    kept = []
    for cuts in (1, 2, 4):
        plan = plan_of(MixingConfig(mixer="cutnmix", cuts=cuts, local_probability=1), rows=2000, height=32, width=32)
        assert plan.local is not None
        assert plan.local.partners.shape == (cuts, 2000)
        kept.append(plan.local.kept.mean().item())
    # Boxes are drawn independently, and each leaves two thirds of what was there on average, more near the border.
    assert kept[0] > kept[1] > kept[2]
    assert kept[1] == pytest.approx(kept[0] ** 2, abs=0.1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("height", "width"), [(8, 12), (9, 7)])
def test_scaling_by_whole_numbers_is_average_pooling(layout: torch.memory_format, height: int, width: int) -> None:
    images = torch.randn(2, 3, 4 * height, 2 * width).contiguous(memory_format=layout)
    top, left = height, width // 2
    boxes = torch.tensor([[top, left, top + height, left + width]] * 2)
    scaled = scale_into_boxes(images, boxes)
    assert scaled.is_contiguous(memory_format=layout)
    expected = torch.zeros_like(images)
    expected[:, :, top : top + height, left : left + width] = F.avg_pool2d(images, (4, 2))
    assert torch.allclose(scaled, expected, atol=1e-6)


def test_scaling_to_the_whole_image_is_the_image_and_to_an_empty_box_nothing() -> None:
    images = torch.randn(2, 3, 7, 5)
    scaled = scale_into_boxes(images, torch.tensor([[0, 0, 7, 5], [3, 2, 3, 2]]))
    assert torch.allclose(scaled[0], images[0], atol=1e-6)
    assert not scaled[1].any()


def test_scaling_by_fractions_keeps_the_mean_and_follows_a_ramp() -> None:
    ramp = torch.linspace(0, 1, 10).expand(1, 1, 10, 10).clone()
    scaled = scale_into_boxes(ramp, torch.tensor([[1, 2, 8, 9]]))[0, 0, 1:8, 2:9]
    assert scaled.mean().item() == pytest.approx(0.5, abs=1e-6)
    steps = scaled[0].diff()
    # Areas at the ends hold whole pixels of unequal shares, so the steps are equal to within some of one.
    assert (steps > 0).all()
    assert steps.mean().item() == pytest.approx((1 / 9) * 10 / 7, rel=0.1)


def test_resizemix_shows_its_partners_whole() -> None:
    """A box of a partner that is dark but for one bright corner has that corner in it, whatever its place."""
    rows, size = 16, 32
    images = torch.zeros(rows, 1, size, size)
    images[:, :, :8, :8] = torch.arange(1.0, rows + 1)[:, None, None, None]
    plan = plan_of(MixingConfig(mixer="resizemix", local_probability=1), rows=rows, height=size, width=size)
    assert plan.local is not None
    mixed = mix_images(images, plan)
    for row in range(rows):
        partner = int(plan.local.partners[0, row])
        top, left, bottom, right = plan.local.boxes[0, row].tolist()
        seen = mixed[row, 0, top:bottom, left:right]
        assert seen.mean().item() == pytest.approx((partner + 1) / 16, rel=1e-4)


def test_resizemix_draws_the_papers_scales_and_stays_inside() -> None:
    height, width = 40, 80
    plan = plan_of(MixingConfig(mixer="resizemix", local_probability=1), rows=5000, height=height, width=width)
    assert plan.local is not None
    top, left, bottom, right = plan.local.boxes[0].double().unbind(1)
    across, along = (bottom - top) / height, (right - left) / width
    assert (across - along).abs().max() <= 0.5 / 40 + 0.5 / 80
    assert (across.min().item(), across.max().item()) == pytest.approx((0.1, 0.8))
    assert across.mean().item() == pytest.approx(0.45, abs=0.02)
    # Where there is room, every place is as likely: the gap before is as wide as the gap behind.
    assert top.mean().item() == pytest.approx((height - bottom).mean().item(), rel=0.05)
    assert left.mean().item() == pytest.approx((width - right).mean().item(), rel=0.05)
