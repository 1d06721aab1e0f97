"""A plan is a pure function of its keys, and its draws have the distributions they should."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from scipy import stats

from metamixer_ray.mixing import MixingConfig, MixPlan, label_sources
from metamixer_ray.mixing.config import MixerName
from metamixer_ray.randomness import numpy_generator
from tests.mixing.plans import drawn_plans, flat, plan_of, quick, same_plan

BOTH = MixingConfig(local_probability=1, global_probability=1)
DRAWS = 2000


def coins(config: MixingConfig) -> tuple[np.ndarray, np.ndarray]:
    """Which of many batches were mixed locally and globally."""
    plans = [plan_of(config, step=step, rows=4) for step in range(DRAWS)]
    return np.array([p.local is not None for p in plans]), np.array([p.glob is not None for p in plans])


def within(share: float, probability: float) -> bool:
    """Whether a share of ``DRAWS`` coins fits their probability (4 standard deviations)."""
    return abs(share - probability) <= 4 * (probability * (1 - probability) / DRAWS) ** 0.5


def test_a_plan_is_the_same_whenever_it_is_drawn() -> None:
    assert same_plan(plan_of(BOTH, seed=3, epoch=2, step=5), plan_of(BOTH, seed=3, epoch=2, step=5))


def test_a_plan_differs_with_every_key() -> None:
    keys = [{}, {"seed": 1}, {"epoch": 1}, {"step": 1}, {"replica": 1}]
    lambdas = {tuple(plan_of(BOTH, **key).glob.kept.tolist()) for key in keys}  # type: ignore[union-attr]
    boxes = {str(plan_of(BOTH, **key).local.boxes.tolist()) for key in keys}  # type: ignore[union-attr]
    assert len(lambdas) == len(boxes) == len(keys)


def test_a_plan_comes_from_the_purpose_mix_alone() -> None:
    config = MixingConfig(mixer="mixup", global_probability=1)
    rng = numpy_generator(7, "mix", 1, 2, 3)
    rng.random()
    plan = plan_of(config, seed=7, epoch=1, step=2, replica=3)
    assert plan.glob is not None
    assert plan.glob.partner.tolist() == rng.permutation(8).tolist()


@pytest.mark.parametrize("mixer", ["mixup", "cutmix", "manifold-mixup", "metamixer"])
def test_no_global_random_state_is_read_or_written(mixer: MixerName) -> None:
    config = MixingConfig(mixer=mixer, local_probability=1, global_probability=1, pairing="free")
    drawn = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        drawn.append(plan_of(config))
        assert before == (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        )
    assert same_plan(*drawn)


@pytest.mark.parametrize("mixer", ["mixup", "cutmix", "manifold-mixup", "metamixer"])
def test_the_last_epochs_are_unmixed(mixer: MixerName) -> None:
    config = MixingConfig(mixer=mixer, local_probability=1, global_probability=1, off_epochs=3)
    assert [plan_of(config, epoch=epoch, epochs=10).mixed for epoch in range(10)] == [True] * 7 + [False] * 3


def test_more_off_epochs_than_epochs_mix_nothing() -> None:
    config = MixingConfig(local_probability=1, global_probability=1, off_epochs=5)
    assert not any(plan_of(config, epoch=epoch, epochs=2).mixed for epoch in range(2))


@pytest.mark.parametrize("epoch", [-1, 10])
def test_an_epoch_outside_the_training_is_refused(epoch: int) -> None:
    with pytest.raises(ValueError, match="count from 0"):
        plan_of(BOTH, epoch=epoch, epochs=10)


def test_none_never_mixes() -> None:
    config = MixingConfig(mixer="none", local_probability=1, global_probability=1)
    assert flat(plan_of(config)) == [8]


def test_two_coins_are_independent() -> None:
    local, glob = coins(MixingConfig(local_probability=0.3, global_probability=0.6))
    assert within(local.mean(), 0.3)
    assert within(glob.mean(), 0.6)
    assert within((local & glob).mean(), 0.18)


def test_one_coin_decides_together() -> None:
    local, glob = coins(MixingConfig(local_probability=0.3, global_probability=0.9, mix_together=True))
    assert (local == glob).all()
    assert within(local.mean(), 0.3)


@pytest.mark.parametrize("probability", [0.0, 0.4, 1.0])
def test_single_stage_mixers_follow_their_own_probability(probability: float) -> None:
    for mixer in ("mixup", "manifold-mixup"):
        local, glob = coins(MixingConfig(mixer=mixer, global_probability=probability, local_probability=0.5))
        assert not local.any()
        assert within(glob.mean(), probability)
    local, glob = coins(MixingConfig(mixer="cutmix", local_probability=probability, global_probability=0.5))
    assert not glob.any()
    assert within(local.mean(), probability)


@pytest.mark.parametrize("mixer", ["manifold-mixup", "metamixer"])
@pytest.mark.parametrize(("chosen", "expected"), [(None, (0, 1, 2)), ((2, 0), (0, 2)), ((1,), (1,))])
def test_the_stage_is_uniform_over_those_chosen(
    mixer: MixerName, chosen: tuple[int, ...] | None, expected: tuple[int, ...]
) -> None:
    config = MixingConfig(mixer=mixer, global_probability=1, local_probability=0, mix_stages=chosen)
    stages = [plan_of(config, step=step, rows=4).glob.stage for step in range(DRAWS)]  # type: ignore[union-attr]
    assert set(stages) == set(expected)
    assert all(within(stages.count(stage) / DRAWS, 1 / len(expected)) for stage in expected)


def test_mixup_stays_at_the_input() -> None:
    config = MixingConfig(mixer="mixup", global_probability=1, mix_stages=(1, 2))
    assert {plan_of(config, step=step).glob.stage for step in range(20)} == {0}  # type: ignore[union-attr]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_lambda_follows_its_beta_up_to_the_rounding(alpha: float) -> None:
    config = MixingConfig(mixer="mixup", global_probability=1, global_alpha=alpha)
    plan = plan_of(config, rows=20_000)
    assert plan.glob is not None
    lam = plan.glob.kept.double().numpy()
    assert np.array_equal(np.rint(lam * 256), lam * 256)
    # At a rounding boundary the distribution function of the rounded numbers is that of the numbers.
    edges = (np.arange(256) + 0.5) / 256
    empirical = np.searchsorted(np.sort(lam), edges, side="right") / len(lam)
    assert np.abs(empirical - stats.beta(alpha, alpha).cdf(edges)).max() < 0.015


@pytest.mark.parametrize("mixer", ["mixup", "cutmix", "cutnmix", "manifold-mixup", "metamixer"])
@pytest.mark.parametrize(("local_alpha", "global_alpha"), [(1000.0, 0.01), (0.01, 1000.0)])
def test_each_kind_of_mixing_has_its_own_alpha(mixer: MixerName, local_alpha: float, global_alpha: float) -> None:
    """A large alpha gives lambdas about one half, a small one lambdas of 0 or 1."""
    config = MixingConfig(
        mixer=mixer,
        local_alpha=local_alpha,
        global_alpha=global_alpha,
        local_probability=1,
        global_probability=1,
        cuts=1,
    )
    plan = plan_of(config, rows=1000, height=64, width=64)
    if plan.glob is not None:
        halves = (plan.glob.kept - 0.5).abs() < 0.1
        assert halves.float().mean().item() == pytest.approx(1 if global_alpha > 1 else 0, abs=0.05)
    if plan.local is not None:
        # Half of the area is a box of 0.7 of the sides, which clipping never shrinks to nothing.
        empty = plan.local.kept == 1
        assert empty.float().mean().item() == pytest.approx(0 if local_alpha > 1 else 0.5, abs=0.05)
    assert (plan.local is not None) == (mixer in ("cutmix", "cutnmix", "metamixer"))
    assert (plan.glob is not None) == (mixer not in ("cutmix", "cutnmix"))


def test_every_row_has_its_own_lambda_and_box() -> None:
    plan = plan_of(BOTH, rows=64, height=32, width=32)
    assert plan.local is not None
    assert plan.glob is not None
    assert len(plan.glob.kept.unique()) > 32
    assert len(plan.local.boxes[0].unique(dim=0)) > 32


@given(drawn_plans())
@quick
def test_plans_are_well_formed(drawn: tuple[MixPlan, int, int]) -> None:
    plan, height, width = drawn
    assert plan.mixed == (plan.local is not None or plan.glob is not None)
    if plan.local is not None:
        local = plan.local
        dtypes = (local.partners.dtype, local.boxes.dtype, local.weights.dtype)
        assert dtypes == (torch.int64, torch.int64, torch.float32)
        count = len(local.partners)
        assert local.boxes.shape == (count, plan.rows, 4)
        assert local.weights.shape == (count + 1, plan.rows)
        top, left, bottom, right = local.boxes.unbind(2)
        assert ((top >= 0) & (top <= bottom) & (bottom <= height)).all()
        assert ((left >= 0) & (left <= right) & (right <= width)).all()
        assert all(sorted(partner) == list(range(plan.rows)) for partner in local.partners.tolist())
    if plan.glob is not None:
        glob = plan.glob
        assert (glob.partner.dtype, glob.kept.dtype) == (torch.int64, torch.float32)
        assert ((glob.kept >= 0) & (glob.kept <= 1)).all()
        assert sorted(glob.partner.tolist()) == list(range(plan.rows))


@given(drawn_plans())
@quick
def test_label_sources_are_convex_weights_of_the_row_itself_and_others(
    drawn: tuple[MixPlan, int, int],
) -> None:
    plan = drawn[0]
    indices, weights = label_sources(plan)
    assert indices.dtype == torch.int64
    assert weights.dtype == torch.float32
    local_sources = 1 if plan.local is None else 1 + len(plan.local.partners)
    assert indices.shape == weights.shape == (plan.rows, local_sources * (1 + bool(plan.glob)))
    assert indices[:, 0].tolist() == list(range(plan.rows))
    assert (weights >= 0).all()
    assert torch.allclose(weights.sum(1), torch.ones(plan.rows), atol=1e-6)


@given(drawn_plans())
@quick
def test_moving_a_plan_changes_nothing(drawn: tuple[MixPlan, int, int]) -> None:
    plan = drawn[0]
    assert same_plan(plan.to("cpu"), plan)


def test_moving_a_plan_moves_every_tensor() -> None:
    moved = plan_of(BOTH).to(torch.device("meta"))
    assert moved.local is not None
    assert moved.glob is not None
    local = (moved.local.partners, moved.local.boxes, moved.local.weights)
    tensors = (*local, moved.glob.partner, moved.glob.kept)
    assert all(tensor.is_meta for tensor in tensors)
    assert all(tensor.is_meta for tensor in label_sources(moved))
