"""CutMix and mixup against torchvision's and timm's, where the definitions coincide.

torchvision pairs row i with row i - 1, timm with row B - 1 - i, both with numbers they draw themselves: those
are repeated here from the same seed and handed to our functions.
"""

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from torchvision.transforms import v2

from metamixer_ray.mixing import GlobalMix, MixingConfig, MixPlan, mix_images, mix_targets
from metamixer_ray.mixing.local_mixing import clipped_boxes
from tests.mixing.plans import local_mix, plan_of

ROWS, CLASSES = 8, 5
SIZES = [(32, 32), (12, 40), (31, 9)]

rolled = torch.arange(ROWS).roll(1)
flipped = torch.arange(ROWS).flip(0)


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.arange(ROWS) % CLASSES


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    return torch.eye(CLASSES)[labels]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(5))
def test_cutmix_equals_torchvisions(size: tuple[int, int], seed: int, labels: torch.Tensor) -> None:
    height, width = size
    images = torch.randn(ROWS, 3, height, width)
    reference = v2.CutMix(num_classes=CLASSES)
    torch.manual_seed(seed)
    expected_images, expected_targets = reference(images, labels)

    torch.manual_seed(seed)
    lam = torch.distributions.Beta(torch.ones(1), torch.ones(1)).sample(()).numpy().astype(np.float64)
    column, row = torch.randint(width, (1,)).numpy(), torch.randint(height, (1,)).numpy()
    box = clipped_boxes(lam, row, column, height=height, width=width)
    plan = MixPlan(ROWS, local_mix(rolled, box.repeat(ROWS, axis=0), height=height, width=width))
    assert torch.equal(mix_images(images, plan), expected_images)
    assert torch.allclose(mix_targets(one_hot(labels), plan), expected_targets, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_mixup_equals_torchvisions(seed: int, labels: torch.Tensor) -> None:
    images = torch.randn(ROWS, 3, 8, 8)
    torch.manual_seed(seed)
    expected_images, expected_targets = v2.MixUp(num_classes=CLASSES)(images, labels)
    torch.manual_seed(seed)
    lam = torch.distributions.Beta(torch.ones(1), torch.ones(1)).sample(())
    plan = MixPlan(ROWS, glob=GlobalMix(rolled, lam.expand(ROWS), 0))
    assert torch.allclose(mix_images(images, plan), expected_images, atol=1e-6)
    assert torch.allclose(mix_targets(one_hot(labels), plan), expected_targets, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_cutmix_per_row_equals_timms(size: tuple[int, int], labels: torch.Tensor) -> None:
    height, width = size
    images = torch.randn(ROWS, 3, height, width)
    reference = Mixup(
        mixup_alpha=0, cutmix_alpha=1, mode="elem", label_smoothing=0, num_classes=CLASSES, correct_lam=True
    )
    np.random.seed(0)
    expected_images, expected_targets = reference(images.clone(), labels)

    np.random.seed(0)
    lam, _ = reference._params_per_elem(ROWS)
    boxes = np.array([cutmix_bbox_and_lam((3, height, width), one)[0] for one in lam])[:, [0, 2, 1, 3]]
    plan = MixPlan(ROWS, local_mix(flipped, boxes, height=height, width=width))
    assert torch.equal(mix_images(images, plan), expected_images)
    assert torch.allclose(mix_targets(one_hot(labels), plan), expected_targets, atol=1e-6)


def test_mixup_per_row_equals_timms(labels: torch.Tensor) -> None:
    images = torch.randn(ROWS, 3, 8, 8)
    reference = Mixup(mixup_alpha=1, cutmix_alpha=0, mode="elem", label_smoothing=0, num_classes=CLASSES)
    np.random.seed(0)
    expected_images, expected_targets = reference(images.clone(), labels)
    np.random.seed(0)
    lam, _ = reference._params_per_elem(ROWS)
    plan = MixPlan(ROWS, glob=GlobalMix(flipped, torch.from_numpy(lam), 0))
    assert torch.allclose(mix_images(images, plan), expected_images, atol=1e-6)
    assert torch.allclose(mix_targets(one_hot(labels), plan), expected_targets, atol=1e-6)


@pytest.mark.parametrize(("size", "alpha"), [((32, 32), 1.0), ((12, 40), 1.0), ((16, 16), 0.3)])
def test_boxes_and_kept_areas_are_distributed_as_torchvisions(size: tuple[int, int], alpha: float) -> None:
    reference = v2.CutMix(alpha=alpha, num_classes=CLASSES)
    image = [torch.zeros(1, 3, *size)]
    torch.manual_seed(0)
    theirs = [reference.make_params(image) for _ in range(4000)]
    config = MixingConfig(mixer="cutmix", local_probability=1, local_alpha=alpha)
    plan = plan_of(config, rows=40_000, height=size[0], width=size[1])
    assert plan.local is not None
    # Equal areas must compare equal although torchvision counts them in float64.
    kept = np.round([params["lam_adjusted"] for params in theirs], 6)
    assert stats.ks_2samp(kept, plan.local.kept.double().numpy().round(6)).statistic < 0.03
    left, top, right, bottom = np.array([params["box"] for params in theirs]).T
    for edge, ours in zip((top, left, bottom, right), plan.local.boxes[0].T.numpy(), strict=True):
        assert stats.ks_2samp(edge, ours).statistic < 0.03
