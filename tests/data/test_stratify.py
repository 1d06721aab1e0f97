import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metamixer_ray.data.stratify import allocate, choose


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.floats(0, 1))
def test_allocation_is_exact_within_bounds_and_near_the_shares(counts: list[int], share: float) -> None:
    have = np.array(counts)
    least = np.minimum(have, 2)
    total = int(least.sum() + share * (have.sum() - least.sum()))
    given_out = allocate(have, total, least=least, most=have)
    assert given_out.sum() == total
    assert (least <= given_out).all()
    assert (given_out <= have).all()
    ideal = total * have / max(have.sum(), 1)
    assert (given_out <= np.maximum(np.ceil(ideal), least)).all(), "no class gets more than its rounded-up share"


def test_balanced_classes_get_equal_parts() -> None:
    have = np.full(10, 500)
    assert allocate(have, 200, least=np.zeros(10, int), most=have).tolist() == [20] * 10


def test_an_impossible_total_is_refused() -> None:
    have = np.array([3, 3])
    with pytest.raises(ValueError, match="7 places"):
        allocate(have, 7, least=np.zeros(2, int), most=have)


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=10), st.integers(0, 10**6))
def test_choice_takes_the_asked_number_of_each_class_and_nests(counts: list[int], seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    few, many = np.array(counts) // 3, np.array(counts) // 2
    chosen_few = choose(labels, few, np.random.default_rng(seed))
    chosen_many = choose(labels, many, np.random.default_rng(seed))
    assert np.bincount(labels[chosen_few], minlength=len(counts)).tolist() == few.tolist()
    assert np.bincount(labels[chosen_many], minlength=len(counts)).tolist() == many.tolist()
    assert (chosen_many | ~chosen_few).all()
