"""The order of streamed sets."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metamixer_ray.data import BatchOrder, DecodedSet, Layout, train_batches
from metamixer_ray.data.config import DataConfig
from metamixer_ray.data.joining import couples_and_single, join_or_keep
from metamixer_ray.data.windows import cut_windows, windowed_units
from metamixer_ray.randomness import numpy_generator


def labels_of(counts: list[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def groups_of(count: int, rows: int, seed: int = 0) -> np.ndarray:
    """Row groups of 1 to ``rows`` images; numbers of some are left out, as a selection may do."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, rows + 1, count)
    return np.repeat(3 * np.arange(count), sizes)[:count]


def order_of(labels: np.ndarray, layout: Layout, batch_size: int = 16, replicas: int = 1, quadruples: bool = True):
    return BatchOrder(labels, batch_size=batch_size, replicas=replicas, quadruples=quadruples, seed=3, layout=layout)


counts_of_classes = st.lists(st.integers(1, 40), min_size=2, max_size=30)
layouts = st.tuples(st.integers(1, 30), st.integers(1, 200), st.integers(0, 2**31))


@settings(deadline=None)
@given(counts=counts_of_classes, layout=layouts)
def test_windows_hold_every_image_once_and_are_bounded(counts: list[int], layout: tuple[int, int, int]) -> None:
    rows, window, seed = layout
    groups = groups_of(sum(counts), rows, seed)
    windows = cut_windows(Layout(groups, window), np.random.default_rng(seed))
    assert sorted(np.concatenate(windows)) == list(range(len(groups)))
    largest = np.bincount(groups).max()
    assert all(0 < len(w) <= window + largest for w in windows)
    owners = [set(groups[w]) for w in windows]
    assert sum(map(len, owners)) == len(set(groups)), "no row group is divided"


@settings(deadline=None)
@given(counts=counts_of_classes, layout=layouts, replicas=st.integers(1, 4), quadruples_per_replica=st.integers(1, 10))
def test_quadruples_hold_for_any_classes_and_layout(
    counts: list[int], layout: tuple[int, int, int], replicas: int, quadruples_per_replica: int
) -> None:
    rows, window, seed = layout
    labels = labels_of(counts, seed)
    order = order_of(
        labels, Layout(groups_of(len(labels), rows, seed), window), 4 * replicas * quadruples_per_replica, replicas
    )
    batches = order.epoch(1)
    sizes = [len(batch) for batch in batches]
    assert len(batches) == order.steps_per_epoch
    assert all(size % (4 * replicas) == 0 and 0 < size <= order.batch_size for size in sizes)
    assert max(sizes) - min(sizes) <= 4 * replicas
    used = np.concatenate(batches)
    quadruples = labels[used].reshape(-1, 4)
    assert (quadruples[:, 0] == quadruples[:, 1]).all()
    assert (quadruples[:, 2] == quadruples[:, 3]).all()
    couples = (np.array(counts) + 1) // 2
    filled = len(quadruples) - -(-couples.sum() // 2)
    assert 0 <= filled < replicas
    seen = np.bincount(used, minlength=len(labels))
    assert (seen >= 1).all()
    assert seen.sum() == len(labels) + (np.array(counts) % 2).sum() + 2 * (couples.sum() % 2) + 4 * filled


@settings(deadline=None)
@given(counts=counts_of_classes, layout=layouts)
def test_repeats_are_images_of_the_last_window(counts: list[int], layout: tuple[int, int, int]) -> None:
    rows, window, seed = layout
    labels = labels_of(counts, seed)
    parts = Layout(groups_of(len(labels), rows, seed), window)
    order = order_of(labels, parts, replicas=3, batch_size=48)
    used = np.concatenate(order.epoch(0))
    *before, last = windowed_units(labels, parts, quadruples=True, rng=numpy_generator(3, "order", 0))
    begins = sum(map(len, before)) * 4
    assert len(np.unique(used[:begins])) == begins
    assert set(used[begins:]) == set(last.reshape(-1))


@settings(deadline=None)
@given(counts=counts_of_classes, layout=layouts, quadruples=st.booleans())
def test_a_batch_needs_few_row_groups(counts: list[int], layout: tuple[int, int, int], quadruples: bool) -> None:
    """What is used of a window before the next one is reached, but for the images that wait, is of that window."""
    rows, window, seed = layout
    labels = labels_of(counts, seed)
    parts = Layout(groups_of(len(labels), rows, seed), window)
    windows = cut_windows(parts, np.random.default_rng(seed))
    units = windowed_units(labels, parts, quadruples=quadruples, rng=np.random.default_rng(seed))
    assert len(units) == len(windows)
    read: set[int] = set()
    used: set[int] = set()
    most_waiting = (len(counts) + 2 * (parts.most_kept + 1)) if quadruples else 0
    for window_rows, window_units in zip(windows, units, strict=True):
        read |= set(window_rows.tolist())
        used |= set(window_units.reshape(-1).tolist())
        assert used <= read
        assert len(read - used) <= most_waiting


def test_random_layouts_mix_classes() -> None:
    """A thousand classes, as shuffled files have them: nobody is joined with its own class, few images wait."""
    labels = labels_of([30] * 1000)
    layout = Layout(np.arange(len(labels)) // 100, 4096)
    batches = order_of(labels, layout, 256).epoch(0)
    used = np.concatenate(batches)
    assert sorted(used) == list(range(len(labels)))
    assert (labels[used][::4] != labels[used][2::4]).all()


def test_files_sorted_by_class_still_give_quadruples_of_two_classes() -> None:
    labels = np.repeat(np.arange(20), 100)
    used = np.concatenate(order_of(labels, Layout(np.arange(2000) // 50, 400)).epoch(0))
    assert sorted(used) == list(range(2000))
    assert (labels[used][::4] == labels[used][2::4]).mean() < 0.1


@pytest.mark.parametrize("quadruples", [True, False])
def test_order_is_a_pure_function_of_seed_and_epoch(quadruples: bool) -> None:
    labels = labels_of([20] * 5)
    layout = Layout(groups_of(100, 7), 30)

    def rows(epoch: int) -> list[int]:
        return np.concatenate(order_of(labels, layout, quadruples=quadruples).epoch(epoch)).tolist()

    assert rows(2) == rows(2)
    assert rows(2) != rows(3)
    if not quadruples:
        assert sorted(rows(1)) == list(range(100))


def test_couples_join_those_that_waited_first() -> None:
    labels = np.array([1, 0, 0, 0, 0, 1, 2])
    couples, single = couples_and_single(labels, 2, np.random.default_rng(0))
    assert labels[single].tolist() == [2]
    assert {0, 1} <= set(couples.reshape(-1).tolist())
    assert (labels[couples[:, 0]] == labels[couples[:, 1]]).all()
    assert sorted([*couples.reshape(-1), *single]) == list(range(7))


@settings(deadline=None)
@given(classes=st.lists(st.integers(0, 4), max_size=60), most=st.integers(0, 10), seed=st.integers(0, 999))
def test_couples_are_joined_or_kept(classes: list[int], most: int, seed: int) -> None:
    values = np.array(classes, dtype=np.int64)
    left, right, kept = join_or_keep(values, most, np.random.default_rng(seed))
    assert sorted([*left, *right, *kept]) == list(range(len(classes)))
    counts = np.bincount(values, minlength=1)
    surplus = max(0, 2 * counts.max() - len(classes))
    assert len(kept) <= max(most, len(classes) % 2) + 1
    assert (values[left] == values[right]).sum() == max(0, surplus - len(kept)) // 2


def test_an_order_and_a_set_of_another_kind_do_not_fit() -> None:
    images = DecodedSet(torch.zeros(8, 3, 4, 4, dtype=torch.uint8), torch.arange(8) % 2)
    order = order_of(images.labels.numpy(), Layout(np.zeros(8, dtype=np.int64), 8), 8)
    with pytest.raises(ValueError, match="layout"):
        train_batches(images, order, DataConfig(), seed=0, epoch=0, replica=0)
