"""Work done by other processes: in order, errors as they were, not further ahead than asked, nothing left behind."""

import gc
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metamixer_ray.data.helpers import helped
from metamixer_ray.errors import DataError

NAMED = {"who": "a process", "remedy": "go on"}


def described(job: Any) -> tuple[Any, int]:
    return job, os.getpid()


@settings(max_examples=15)
@given(jobs=st.lists(st.integers(), max_size=20), processes=st.integers(1, 3), each=st.integers(1, 3))
def test_results_come_in_order_from_all_of_them(jobs: list[int], processes: int, each: int) -> None:
    results = list(helped(described, jobs, processes=processes, each=each, **NAMED))
    assert [job for job, _ in results] == jobs
    assert len({process for _, process in results}) == min(processes, len(jobs))
    assert os.getpid() not in {process for _, process in results}


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (1000, 77)])
@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float32, np.bool_])
def test_arrays_and_tensors_arrive_as_they_were_and_can_be_written_to(shape: tuple[int, ...], kind: type) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(kind)
    sent = {"tensor": torch.from_numpy(array.copy()), "arrays": [array, array.T, array[..., ::-1] if shape else array]}
    ((back, _),) = helped(described, [sent], processes=1, each=1, **NAMED)
    assert torch.equal(back["tensor"], sent["tensor"])
    assert back["tensor"].dtype == sent["tensor"].dtype
    for ours, theirs in zip(sent["arrays"], back["arrays"], strict=True):
        assert np.array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    back["tensor"].zero_()
    back["arrays"][0][...] = 0


def refuse(job: int) -> int:
    if job == 3:
        raise DataError("row 3: not an image")
    if job == 5:
        raise OddError(1, 2)
    return job


class OddError(Exception):
    """One that can be sent, but would not arrive."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def test_a_persons_error_arrives_at_its_place_without_a_trace_of_processes() -> None:
    coming = helped(refuse, itertools.count(), processes=2, each=2, **NAMED)
    assert [next(coming) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="row 3: not an image") as raised:
        next(coming)
    assert not hasattr(raised.value, "__notes__")


def test_an_error_of_the_code_says_where_it_arose() -> None:
    with pytest.raises(RuntimeError, match="OddError: 1 and 2") as raised:
        list(helped(refuse, [5], processes=1, each=1, **NAMED))
    assert "in refuse" in raised.value.__notes__[0]


def test_what_cannot_be_sent_back_is_an_error_too() -> None:
    with pytest.raises(Exception, match="lambda") as raised:
        list(helped(lambda job: lambda: job, [1], processes=1, each=1, **NAMED))
    assert "_send" in raised.value.__notes__[0]


def test_jobs_are_asked_for_no_further_ahead_than_said_and_their_error_is_raised() -> None:
    asked: list[int] = []

    def jobs() -> Iterator[int]:
        for job in range(20):
            asked.append(job)
            yield job
        raise DataError("the file is torn")

    coming = helped(described, jobs(), processes=2, each=3, **NAMED)
    for taken in range(1, 5):
        next(coming)
        assert len(asked) == taken + 2 * 3
    with pytest.raises(DataError, match="torn"):
        list(coming)
    assert not multiprocessing.active_children()


def test_nothing_is_left_open_on_disk_or_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def descriptors() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    rounds = 20
    before, children = descriptors(), set(multiprocessing.active_children())
    for taken in range(rounds):
        coming = helped(described, (np.zeros(job) for job in range(15)), processes=2, each=2, **NAMED)
        assert len(list(itertools.islice(coming, taken))) == min(taken, 15)
        coming.close()
        assert set(multiprocessing.active_children()) == children
    # What else is in this process may open some meanwhile.
    assert descriptors() < before + rounds
    assert not list(tmp_path.iterdir())


def test_two_groups_at_a_time_do_not_hold_each_other() -> None:
    first = helped(described, itertools.count(), processes=1, each=1, **NAMED)
    next(first)
    second = helped(described, itertools.count(), processes=1, each=1, **NAMED)
    job, process = next(second)
    first.close()
    assert job == 0
    assert [child.pid for child in multiprocessing.active_children()] == [process]
    second.close()
    assert not multiprocessing.active_children()
