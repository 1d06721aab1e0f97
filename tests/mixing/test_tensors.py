"""What mixing keeps: dtype, memory layout, the input itself, and gradients; and when it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from metamixer_ray.mixing import (
    MixingConfig,
    MixPlan,
    label_sources,
    mix_features,
    mix_images,
    mix_tap,
    mix_targets,
)
from tests.mixing.plans import global_plan, matrix, plan_of, quick

INPUT = MixingConfig(local_probability=1, global_probability=1, mix_stages=(0,))
INSIDE = MixingConfig(local_probability=1, global_probability=1, mix_stages=(2,))
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtype_and_layout_are_kept(dtype: torch.dtype, layout: torch.memory_format) -> None:
    images = torch.randn(8, 3, 8, 12).to(dtype).contiguous(memory_format=layout)
    for mixed in (mix_images(images, plan_of(INPUT)), mix_features(images, plan_of(INSIDE))):
        assert mixed.dtype == dtype
        assert mixed.shape == images.shape
        assert mixed.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(1, 1), (8, 12), (12, 8)])
def test_the_layout_does_not_change_the_values(channels: int, size: tuple[int, int]) -> None:
    images = torch.randn(8, channels, *size)
    plan = plan_of(INPUT, height=size[0], width=size[1])
    assert torch.equal(mix_images(images.to(memory_format=torch.channels_last), plan), mix_images(images, plan))
    strided = torch.randn(8, *size, 2 * channels)[..., ::2].permute(0, 3, 1, 2)
    assert torch.equal(mix_images(strided, plan), mix_images(strided.contiguous(), plan))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_input_is_left_alone(layout: torch.memory_format) -> None:
    images = torch.randn(8, 3, 8, 12).contiguous(memory_format=layout)
    targets = torch.eye(8)
    before = images.clone(), targets.clone()
    mix_images(images, plan_of(INPUT))
    mix_features(images, plan_of(INSIDE))
    mix_targets(targets, plan_of(INPUT))
    assert torch.equal(images, before[0])
    assert torch.equal(targets, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lambdas_are_exact_in_reduced_precision(dtype: torch.dtype) -> None:
    config = MixingConfig(mixer="manifold-mixup", global_probability=1, mix_stages=(1,))
    plan = plan_of(config, rows=64)
    weights = mix_features(torch.eye(64, dtype=dtype), plan)
    assert torch.equal(weights.double(), matrix(*label_sources(plan)))


def test_reduced_precision_is_rounded_once() -> None:
    plan = plan_of(INSIDE, rows=32)
    features = torch.randn(32, 16, 4, 4).bfloat16()
    assert torch.equal(mix_features(features, plan), mix_features(features.float(), plan).bfloat16())


@given(st.integers(1, 12), st.integers(0, 1000))
@quick
def test_gradient_by_hand(rows: int, seed: int) -> None:
    plan = global_plan(rows, stage=1, seed=seed)
    assert plan.glob is not None
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, 5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(rows, 5, 3, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(mix_features(features, plan), features, upstream)
    kept = plan.glob.kept.double()[:, None, None]
    expected = kept * upstream
    for row, partner in enumerate(plan.glob.partner.tolist()):
        expected[partner] += (1 - kept[row]) * upstream[row]
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_gradient_numerically_through_images_and_tap_in_both_layouts() -> None:
    plans = plan_of(INPUT, rows=4, height=3, width=4), plan_of(INSIDE, rows=4, height=3, width=4)
    for layout in LAYOUTS:
        images = torch.randn(4, 2, 3, 4, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
        for plan in plans:
            assert torch.autograd.gradcheck(lambda x, plan=plan: mix_features(mix_images(x, plan), plan), (images,))


def test_a_tap_works_under_autocast() -> None:
    plan = plan_of(INSIDE, rows=8)
    (tap,) = mix_tap(plan).values()
    conv = nn.Conv2d(3, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        features = conv(torch.randn(8, 3, 8, 8))
        mixed = tap(features)
        assert features.dtype == mixed.dtype == torch.bfloat16
        mixed.float().square().mean().backward()
    assert conv.weight.grad is not None
    assert conv.weight.grad.abs().sum() > 0


def test_the_tap_sits_at_the_stage_of_the_plan() -> None:
    features = torch.randn(8, 6)
    taps = mix_tap(plan_of(INSIDE))
    assert list(taps) == [2]
    assert torch.equal(taps[2](features), mix_features(features, plan_of(INSIDE)))
    assert not torch.equal(taps[2](features), features)


def test_no_tap_where_nothing_is_mixed_inside() -> None:
    local_only = MixingConfig(local_probability=1, global_probability=0)
    for plan in (plan_of(INPUT), plan_of(local_only), MixPlan(8)):
        assert mix_tap(plan) == {}
        features = torch.randn(8, 6)
        assert mix_features(features, plan) is features


def test_an_unmixed_plan_returns_what_it_got() -> None:
    images, targets = torch.randn(8, 3, 4, 4), torch.eye(8)
    assert mix_images(images, MixPlan(8)) is images
    assert mix_targets(targets, MixPlan(8)) is targets


def test_a_batch_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8 rows.*\(6, 3, 8, 12\)"):
        mix_images(torch.zeros(6, 3, 8, 12), plan_of(INPUT))
    with pytest.raises(ValueError, match="8 rows"):
        mix_targets(torch.zeros(6, 10), plan_of(INPUT))
    with pytest.raises(ValueError, match="8 rows"):
        mix_features(torch.zeros(16, 49, 32), plan_of(INSIDE))


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        mix_images(torch.zeros(8, 3, 8, 12, dtype=torch.uint8), plan_of(INPUT))
    with pytest.raises(ValueError, match="int64"):
        mix_targets(torch.eye(8, dtype=torch.int64), plan_of(INPUT))
