import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metamixer_ray.data import BatchOrder, DataConfig, wants_quadruples
from metamixer_ray.errors import ConfigError


def labels_of(counts: list[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def check_quadruples(order: BatchOrder, epoch: int = 0) -> None:
    """Every invariant that the docstring promises."""
    labels, replicas = order.labels, order.replicas
    batches = order.epoch(epoch)
    sizes = [len(batch) for batch in batches]
    assert len(batches) == order.steps_per_epoch
    assert all(size % (4 * replicas) == 0 and 0 < size <= order.batch_size for size in sizes)
    assert max(sizes) - min(sizes) <= 4 * replicas

    rows = np.concatenate(batches)
    assert rows.dtype == np.int64
    quadruples = labels[rows].reshape(-1, 4)
    assert (quadruples[:, 0] == quadruples[:, 1]).all()
    assert (quadruples[:, 2] == quadruples[:, 3]).all()

    counts = np.bincount(labels)
    couples = (counts + 1) // 2
    surplus = max(0, 2 * couples.max() - couples.sum())
    filled = len(quadruples) - -(-couples.sum() // 2)
    assert 0 <= filled < replicas
    alike = int((quadruples[:, 0] == quadruples[:, 2]).sum())
    assert surplus // 2 <= alike <= surplus // 2 + filled, "only a surplus may be joined with its own class"

    seen = np.bincount(rows, minlength=len(labels))
    assert (seen >= 1).all()
    companions = (counts % 2).sum() + 2 * (couples.sum() % 2) + 4 * filled
    assert seen.sum() == len(labels) + companions
    if companions == 0:
        assert (seen == 1).all()


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=40),
    quadruples_per_replica=st.integers(1, 20),
    replicas=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_quadruples_hold_for_any_classes(
    counts: list[int], quadruples_per_replica: int, replicas: int, seed: int
) -> None:
    batch_size = 4 * replicas * quadruples_per_replica
    labels = labels_of(counts, seed)
    check_quadruples(BatchOrder(labels, batch_size=batch_size, replicas=replicas, quadruples=True, seed=seed))


@settings(deadline=None)
@given(
    large=st.integers(1, 400),
    rest=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    seed=st.integers(0, 999),
)
def test_one_class_with_up_to_all_of_the_images(large: int, rest: list[int], seed: int) -> None:
    labels = labels_of([*rest, large], seed)
    check_quadruples(BatchOrder(labels, batch_size=32, replicas=2, quadruples=True, seed=seed))


@pytest.mark.parametrize("counts", [[50] * 1000, list(range(1, 301)), [500, 500], [1000, 500, 500], [1] * 30])
def test_quadruples_of_special_shapes(counts: list[int]) -> None:
    check_quadruples(BatchOrder(labels_of(counts), batch_size=128, replicas=1, quadruples=True, seed=3))


def test_absent_classes_are_no_obstacle() -> None:
    check_quadruples(BatchOrder(labels_of([0, 9, 0, 0, 7]), batch_size=8, replicas=1, quadruples=True, seed=0))


def test_partners_are_random() -> None:
    labels = labels_of([40] * 10)
    order = BatchOrder(labels, batch_size=400, replicas=1, quadruples=True, seed=0)
    met = {tuple(pair) for epoch in range(30) for pair in labels[order.epoch(epoch)[0]].reshape(-1, 4)[:, ::2]}
    assert len(met) == 90, "every class meets every other, in both places"


def test_an_odd_one_out_gets_another_companion_each_epoch() -> None:
    labels = np.array([0] * 5 + [1] * 4)
    order = BatchOrder(labels, batch_size=16, replicas=1, quadruples=True, seed=0)
    twice = set()
    for epoch in range(40):
        rows = np.concatenate(order.epoch(epoch))
        for couple in rows.reshape(-1, 2):
            assert couple[0] != couple[1], "a companion is another image where there is one"
        twice |= set(np.flatnonzero(np.bincount(rows[labels[rows] == 0]) == 2))
    assert twice == set(range(5))


@settings(deadline=None)
@given(
    count=st.integers(1, 300),
    per_replica=st.integers(2, 40),
    replicas=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_shuffle_spreads_rows_evenly(count: int, per_replica: int, replicas: int, seed: int) -> None:
    labels = np.zeros(count, dtype=np.int64)
    order = BatchOrder(labels, batch_size=per_replica * replicas, replicas=replicas, quadruples=False, seed=seed)
    batches = order.epoch(1)
    sizes = [len(batch) for batch in batches]
    assert len(batches) == order.steps_per_epoch
    assert all(size % replicas == 0 and size <= order.batch_size for size in sizes)
    assert min(sizes) >= 2 * replicas
    assert max(sizes) - min(sizes) <= replicas
    seen = np.bincount(np.concatenate(batches), minlength=count)
    assert (seen >= 1).all()
    if count % replicas == 0 and count >= 2 * replicas * len(batches):
        assert (seen == 1).all()


@pytest.mark.parametrize("quadruples", [True, False])
def test_order_is_a_pure_function_of_seed_and_epoch(quadruples: bool) -> None:
    labels = labels_of([20] * 5)

    def rows(seed: int, epoch: int) -> list[int]:
        order = BatchOrder(labels, batch_size=16, replicas=2, quadruples=quadruples, seed=seed)
        return np.concatenate(order.epoch(epoch)).tolist()

    assert rows(1, 2) == rows(1, 2)
    assert rows(1, 2) != rows(1, 3)
    assert rows(1, 2) != rows(2, 2)


def test_neither_globals_nor_the_order_of_calls_matter() -> None:
    order = BatchOrder(torch.from_numpy(labels_of([9] * 4)), batch_size=8, replicas=1, quadruples=True, seed=5)
    first = [batch.tolist() for batch in order.epoch(7)]
    np.random.seed(0)
    order.epoch(3)
    assert [batch.tolist() for batch in order.epoch(7)] == first


@pytest.mark.parametrize(
    ("batch_size", "replicas", "quadruples", "valid"),
    [
        (30, 1, True, "28 or 32"),
        (3, 1, True, "4"),
        (100, 8, True, "96 or 128"),
        (0, 2, True, "8"),
        (7, 2, False, "6 or 8"),
        (1, 1, False, "2"),
        (2, 2, False, "4"),
    ],
)
def test_a_batch_size_that_does_not_fit_names_those_that_do(
    batch_size: int, replicas: int, quadruples: bool, valid: str
) -> None:
    with pytest.raises(ConfigError, match=rf"--batch-size {batch_size}: .*: {valid}$"):
        BatchOrder(labels_of([8] * 4), batch_size=batch_size, replicas=replicas, quadruples=quadruples, seed=0)


def test_a_batch_larger_than_the_set_takes_what_there_is() -> None:
    order = BatchOrder(labels_of([6, 6]), batch_size=1024, replicas=1, quadruples=True, seed=0)
    assert [sorted(batch) for batch in order.epoch(0)] == [list(range(12))]


def test_one_class_cannot_form_quadruples() -> None:
    with pytest.raises(ConfigError, match="one class only"):
        BatchOrder(np.zeros(8, dtype=np.int64), batch_size=8, replicas=1, quadruples=True, seed=0)


def test_sampler_option() -> None:
    assert wants_quadruples(DataConfig(), organised=True)
    assert not wants_quadruples(DataConfig(), organised=False)
    assert wants_quadruples(DataConfig(sampler="quadruple"), organised=False)
    assert not wants_quadruples(DataConfig(sampler="shuffle"), organised=False)
    with pytest.raises(ConfigError, match="--sampler shuffle"):
        wants_quadruples(DataConfig(sampler="shuffle"), organised=True)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31))
def test_a_thousand_classes_of_uneven_size(seed: int) -> None:
    counts = np.random.default_rng(seed).integers(1, 60, 1000).tolist()
    check_quadruples(BatchOrder(labels_of(counts, seed), batch_size=256, replicas=4, quadruples=True, seed=seed))
