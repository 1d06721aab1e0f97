import gc
import multiprocessing
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from metamixer_ray.data import (
    Batch,
    BatchOrder,
    DataConfig,
    DecodedSet,
    ImageSet,
    eval_batches,
    normalise,
    train_batches,
)
from metamixer_ray.data.config import Augment
from metamixer_ray.errors import ConfigError


def image_set(count: int = 90, size: int = 12, classes: int = 5) -> ImageSet:
    values = np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return DecodedSet(torch.from_numpy(values), torch.arange(count) % classes)


def order_of(images: ImageSet, replicas: int = 1, quadruples: bool = True) -> BatchOrder:
    return BatchOrder(images.labels, batch_size=24, replicas=replicas, quadruples=quadruples, seed=3)


def same(a: Batch, b: Batch) -> bool:
    pairs = ((a.images, b.images), (a.labels, b.labels), (a.indices, b.indices))
    return a.step == b.step and all(torch.equal(x, y) for x, y in pairs)


def batches(processes: int = 0, replica: int = 0, replicas: int = 1, augment: Augment = "crop-flip", first: int = 0):
    images = image_set()
    config = DataConfig(loader_processes=processes, augment=augment)
    order = order_of(images, replicas)
    return list(train_batches(images, order, config, seed=3, epoch=2, replica=replica, first_step=first))


@pytest.mark.parametrize("augment", ["crop-flip", "trivial", "rand"])
def test_the_number_of_processes_changes_nothing(augment: Augment) -> None:
    reference = batches(0, augment=augment)
    assert [batch.step for batch in reference] == list(range(4))
    for processes in (1, 2):
        others = batches(processes, augment=augment)
        assert all(same(a, b) for a, b in zip(reference, others, strict=True))


@pytest.mark.parametrize("augment", ["none", "crop-flip", "trivial"])
def test_replicas_share_what_one_would_see(augment: Augment) -> None:
    """With an even number of quadruples nothing is filled up, so the global batches are the same."""
    images = image_set(96, classes=4)
    config = DataConfig(augment=augment)

    def run(replicas: int, replica: int) -> list[Batch]:
        order = BatchOrder(images.labels, batch_size=24, replicas=replicas, quadruples=True, seed=3)
        return list(train_batches(images, order, config, seed=3, epoch=0, replica=replica))

    for whole, left, right in zip(run(1, 0), run(2, 0), run(2, 1), strict=True):
        assert torch.equal(whole.images, torch.cat([left.images, right.images]))
        assert torch.equal(whole.labels, torch.cat([left.labels, right.labels]))
        assert torch.equal(whole.indices, torch.cat([left.indices, right.indices]))


@pytest.mark.parametrize("processes", [0, 2])
def test_resuming_within_an_epoch_continues_it(processes: int) -> None:
    whole = batches()
    for first in (1, 3, 4):
        rest = batches(processes, first=first)
        assert all(same(a, b) for a, b in zip(whole[first:], rest, strict=True))


def test_batches_hold_the_images_they_name() -> None:
    images = image_set()
    for batch in train_batches(images, order_of(images), DataConfig(augment="none"), seed=0, epoch=0, replica=0):
        assert batch.images.dtype == torch.uint8
        assert torch.equal(batch.images, images.images[batch.indices])
        assert torch.equal(batch.labels, images.labels[batch.indices])
        quadruples = batch.labels.view(-1, 4)
        assert torch.equal(quadruples[:, 0], quadruples[:, 1])
        assert torch.equal(quadruples[:, 2], quadruples[:, 3])


def test_augmentation_leaves_the_stored_images_alone() -> None:
    images = image_set()
    before = images.images.clone()
    for augment in ("none", "crop", "crop-flip", "trivial", "rand"):
        for batch in train_batches(images, order_of(images), DataConfig(augment=augment), seed=0, epoch=0, replica=0):
            batch.images.zero_()
    assert torch.equal(images.images, before)


def test_selections_read_their_own_rows() -> None:
    images = image_set().select(torch.arange(89, 9, -2))
    order = BatchOrder(images.labels, batch_size=8, replicas=1, quadruples=False, seed=0)
    seen = 0
    for batch in train_batches(images, order, DataConfig(augment="none"), seed=0, epoch=0, replica=0):
        assert torch.equal(batch.images, images.images[batch.indices])
        seen += len(batch.labels)
    assert seen == 40


@pytest.mark.parametrize(("data", "mirrors"), [("digits", False), ("svhn", False), ("cifar10", True), ("/x", True)])
def test_automatic_augmentation_mirrors_only_where_that_is_harmless(data: str, mirrors: bool) -> None:
    images = image_set()

    def pixels(augment: Augment) -> torch.Tensor:
        config = DataConfig(data=data, augment=augment)
        return torch.cat(
            [b.images for b in train_batches(images, order_of(images), config, seed=0, epoch=0, replica=0)]
        )

    assert torch.equal(pixels("auto"), pixels("crop-flip" if mirrors else "crop"))
    assert not torch.equal(pixels("crop"), pixels("crop-flip"))


@pytest.mark.parametrize("processes", [0, 2])
def test_the_global_random_state_is_left_alone(processes: int) -> None:
    torch.manual_seed(1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    batches(processes, augment="trivial")
    list(eval_batches(image_set(), batch_size=16, replica=0, replicas=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numpy_state


def fail_within(iterator: Iterator[Batch]) -> float:
    return sum(1 / (batch.step - batch.step) for batch in iterator)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize("how", ["close", "drop", "exception", "end"])
def test_no_thread_outlives_its_iterator(how: str) -> None:
    images = image_set()
    iterator: Iterator[Batch] = train_batches(images, order_of(images), DataConfig(), seed=0, epoch=0, replica=0)
    next(iterator)
    assert len(threads()) == 1
    if how == "close":
        iterator.close()  # type: ignore[attr-defined]
    elif how == "exception":
        with pytest.raises(ZeroDivisionError):
            fail_within(iterator)
    elif how == "end":
        assert len(list(iterator)) == 3
    del iterator
    gc.collect()
    assert threads() == []


@pytest.mark.parametrize("consumed", [1, 4])
def test_no_process_outlives_its_iterator(consumed: int) -> None:
    before = set(multiprocessing.active_children())
    images = image_set()
    config = DataConfig(loader_processes=2)
    iterator = train_batches(images, order_of(images), config, seed=0, epoch=0, replica=0)
    for _ in range(consumed):
        next(iterator)
    assert len(set(multiprocessing.active_children()) - before) == 2
    del iterator
    gc.collect()
    assert set(multiprocessing.active_children()) == before


def test_an_error_while_making_a_batch_reaches_the_caller() -> None:
    images = image_set()
    order = order_of(images)
    broken = DecodedSet(images.images[:90], images.labels)
    broken._rows = torch.full((90,), 1000)
    for processes in (0, 1):
        config = DataConfig(loader_processes=processes)
        with pytest.raises(IndexError):
            list(train_batches(broken, order, config, seed=0, epoch=0, replica=0))
    assert threads() == []


def test_orders_and_replicas_that_do_not_fit() -> None:
    images = image_set()
    with pytest.raises(ConfigError, match="replica 1 of 1"):
        train_batches(images, order_of(images), DataConfig(), seed=0, epoch=0, replica=1)
    with pytest.raises(ValueError, match="90 images, but the set has 50"):
        train_batches(image_set(50), order_of(images), DataConfig(), seed=0, epoch=0, replica=0)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 16, 17, 33, 90])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_evaluation_sees_every_image_once_in_fixed_order(count: int, replicas: int) -> None:
    images = image_set(count)
    shares = [list(eval_batches(images, batch_size=4, replica=r, replicas=replicas)) for r in range(replicas)]
    seen = torch.cat([batch.indices for share in shares for batch in share])
    assert sorted(seen.tolist()) == list(range(count))
    for replica, share in enumerate(shares):
        rows = [row for batch in share for row in batch.indices.tolist()]
        assert rows == list(range(replica, count, replicas))
        assert all(0 < len(batch.labels) <= 4 for batch in share)
        for batch in share:
            assert torch.equal(batch.images, images.images[batch.indices])
    if count >= replicas:
        assert len({len(share) for share in shares}) == 1, "collectives in the loop stay in step"


def test_normalise() -> None:
    images = image_set(6).images
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    result = normalise(images, mean, std)
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert result.dtype == torch.float32
    assert torch.allclose(result.double(), expected, atol=1e-5)
    assert images.dtype == torch.uint8
