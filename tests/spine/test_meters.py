"""Running sums: means, going on from saved sums, and the lists of stages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metamixer_ray.meters import Meters, gather_stages

values = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20)


@settings(deadline=None, max_examples=50)
@given(values, st.integers(0, 20))
def test_the_mean_whether_saved_in_between_or_not(numbers: list[float], cut: int) -> None:
    whole, first = Meters(), Meters()
    for number in numbers:
        whole.add(loss=torch.tensor(number, requires_grad=True))
    for number in numbers[:cut]:
        first.add(loss=torch.tensor(number))
    second = Meters(first.sums())
    for number in numbers[cut:]:
        second.add(loss=torch.tensor(number))
    mean = whole.means(None, torch.device("cpu"))["loss"]
    assert mean == pytest.approx(sum(numbers) / len(numbers), rel=1e-9, abs=1e-9)
    assert second.sums() == whole.sums()
    assert all(isinstance(v, float) for v in whole.sums().values())


def test_a_name_is_divided_by_how_often_it_was_added() -> None:
    meters = Meters()
    meters.add(loss=torch.tensor(1.0), accuracy=torch.tensor(0.5))
    meters.add(seldom=torch.tensor(10.0))
    meters.add(loss=torch.tensor(2.0), accuracy=torch.tensor(0.25))
    expected = {"loss": 1.5, "accuracy": 0.375, "seldom": 10.0}
    assert meters.means(None, torch.device("cpu")) == expected
    # Saved before anything of a kind came again, nothing is lost.
    resumed = Meters(meters.sums())
    assert resumed.means(None, torch.device("cpu")) == expected
    resumed.add(seldom=torch.tensor(20.0))
    assert resumed.means(None, torch.device("cpu")) == {**expected, "seldom": 15.0}


def test_what_is_not_finite_counts_for_nothing_nor_does_what_comes_with_it() -> None:
    meters = Meters()
    for loss, accuracy in [(1.0, 0.5), (float("nan"), 1.0), (2.0, 0.25), (float("inf"), 0.0)]:
        meters.add(loss=torch.tensor(loss), accuracy=torch.tensor(accuracy))
    meters.add(seldom=torch.tensor(float("nan")))
    assert meters.means(None, torch.device("cpu")) == {"loss": 1.5, "accuracy": 0.375}


def test_nothing_added_gives_nothing() -> None:
    assert Meters().means(None, torch.device("cpu")) == {}


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 12))
def test_stages_become_a_list_in_their_order(stages: int) -> None:
    means = {f"agreement/{i}": i / 10 for i in range(stages, 0, -1)} | {"loss": 1.0, "agreement_else": 2.0}
    expected = [i / 10 for i in range(1, stages + 1)] or None
    assert gather_stages(means, "agreement") == {"loss": 1.0, "agreement_else": 2.0, "agreement": expected}
