"""Work done by other processes: in order, errors as they were, not further ahead than asked, nothing left behind."""

import gc
import itertools
import multiprocessing
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
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


@pytest.mark.parametrize("made", [torch.zeros, torch.ones])
def test_tensors_keep_how_they_lie_in_memory(made: Any) -> None:
    sent = [
        made(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        made(3, 4, 5, dtype=torch.uint8).permute(2, 0, 1),
        made(3, 1, requires_grad=True),
        made(()),
    ]
    ((back, _),) = helped(described, [sent], processes=1, each=1, **NAMED)
    for ours, theirs in zip(sent, back, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
        assert not theirs.requires_grad


def test_what_has_gaps_or_stands_in_one_place_arrives_too() -> None:
    sent = [torch.arange(12).view(3, 4)[:, ::2], torch.ones(1).expand(5), np.array(["a", None], dtype=object)]
    ((back, _),) = helped(described, [sent], processes=1, each=1, **NAMED)
    assert torch.equal(back[0], sent[0])
    assert torch.equal(back[1], sent[1])
    assert np.array_equal(back[2], sent[2])


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


def refuse_to_arrive() -> None:
    raise ValueError("not here")


class Reluctant:
    """Something that can be pickled, and not unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return refuse_to_arrive, ()


def test_a_job_that_cannot_be_read_is_an_error_too() -> None:
    with pytest.raises(ValueError, match="not here"):
        list(helped(described, [Reluctant()], processes=1, each=1, **NAMED))


def test_no_process_and_too_much_at_once_are_refused() -> None:
    for processes, each in ((0, 1), (1, 0), (1, 65)):
        with pytest.raises(ValueError, match="give at least 1"):
            next(helped(described, [1], processes=processes, each=each, **NAMED))


def test_jobs_are_asked_for_no_further_ahead_than_said_and_their_error_is_raised() -> None:
    asked: list[int] = []

    def jobs() -> Iterator[int]:
        for job in range(20):
            asked.append(job)
            yield job
        raise DataError("the file is torn")

    others = set(multiprocessing.active_children())
    coming = helped(described, jobs(), processes=2, each=3, **NAMED)
    for taken in range(1, 15):
        assert next(coming)[0] == taken - 1
        assert len(asked) == taken + 2 * 3
    assert [job for job, _ in itertools.islice(coming, 6)] == list(range(14, 20))
    with pytest.raises(DataError, match="torn"):
        next(coming)
    assert set(multiprocessing.active_children()) == others


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


def after_a_while(job: float) -> float:
    time.sleep(job)
    return job


def test_a_default_timeout_of_sockets_means_nothing_here() -> None:
    socket.setdefaulttimeout(0.05)
    try:
        coming = helped(after_a_while, iter([0.0, 0.3]), processes=1, each=1, **NAMED)
        assert next(coming) == 0.0
        assert next(coming) == 0.3
        coming = helped(after_a_while, (0.0 for _ in range(2)), processes=1, each=1, **NAMED)
        assert next(coming) == 0.0
        time.sleep(0.3)
        assert next(coming) == 0.0
    finally:
        socket.setdefaulttimeout(None)


def sockets(process: int | str) -> set[str]:
    found = set()
    for name in os.listdir(f"/proc/{process}/fd"):
        with suppress(FileNotFoundError):  # what listed them
            found.add(os.readlink(f"/proc/{process}/fd/{name}"))
    return {name for name in found if name.startswith("socket:")}


def test_helpers_hold_no_end_of_the_connections_of_others() -> None:
    """Or a death would be hidden, and what nobody reads any more stay in memory."""
    before = sockets("self")
    first = helped(described, itertools.count(), processes=3, each=1, **NAMED)
    second = helped(described, itertools.count(), processes=2, each=1, **NAMED)
    processes = {process for coming in (first, second) for _, process in itertools.islice(coming, 12)}
    assert len(processes) == 5
    ours = sockets("self") - before
    assert len(ours) >= 5
    for process in processes:
        assert not sockets(process) & ours
    first.close()
    second.close()


def test_two_groups_at_a_time_do_not_hold_each_other() -> None:
    others = set(multiprocessing.active_children())
    first = helped(described, itertools.count(), processes=1, each=1, **NAMED)
    next(first)
    second = helped(described, itertools.count(), processes=1, each=1, **NAMED)
    job, process = next(second)
    first.close()
    assert job == 0
    assert {child.pid for child in set(multiprocessing.active_children()) - others} == {process}
    second.close()
    assert set(multiprocessing.active_children()) == others
