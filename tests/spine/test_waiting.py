"""What a person is told while workers wait for their place."""

import re

import pytest

from metamixer_ray.waiting import AGAIN_SECONDS, IN_PIECES, Waiting


class Cluster:
    """A clock to turn, and what is missing."""

    def __init__(self) -> None:
        self.now, self.missing, self.told = 1000.0, None, list[str]()

    def waiting(self) -> Waiting:
        return Waiting(lambda: self.missing, self.told.append, lambda: self.now)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def test_nothing_is_said_where_nothing_is_missing(cluster: Cluster) -> None:
    waiting = cluster.waiting()
    waiting.begin()
    waiting.look()
    waiting.end()
    assert cluster.told == []


def test_it_is_said_what_is_missing_and_since_when_and_when_it_came(cluster: Cluster) -> None:
    waiting = cluster.waiting()
    waiting.begin()
    cluster.now, cluster.missing = 1060.0, "two GPUs"
    waiting.look()
    cluster.now = 1134.0
    waiting.end()
    first, last = cluster.told
    assert re.fullmatch(r"waiting since \d\d:\d\d:\d\d for two GPUs", first)
    assert last == "all workers have their place, after 2:14"


def test_the_same_is_said_again_only_after_a_while_and_another_thing_at_once(cluster: Cluster) -> None:
    waiting = cluster.waiting()
    waiting.begin()
    cluster.missing = "two GPUs"
    for _ in range(3):
        waiting.look()
        cluster.now += AGAIN_SECONDS / 4
    assert len(cluster.told) == 1
    cluster.missing = "one GPU"
    waiting.look()
    assert len(cluster.told) == 2
    cluster.now += AGAIN_SECONDS
    waiting.look()
    assert len(cluster.told) == 3
    assert len({line.partition(" for ")[0] for line in cluster.told}) == 1


def test_where_enough_seems_free_and_ray_places_nobody_that_is_said(cluster: Cluster) -> None:
    waiting = cluster.waiting()
    waiting.begin()
    waiting.look(in_vain=True)
    assert cluster.told[0].endswith(IN_PIECES)
    cluster.missing = "two GPUs"
    waiting.look(in_vain=True)
    assert cluster.told[1].endswith("for two GPUs")


def test_each_wait_has_its_own_beginning(cluster: Cluster) -> None:
    waiting = cluster.waiting()
    waiting.begin()
    waiting.end()
    cluster.now = 5000.0
    waiting.begin()
    cluster.missing = "a node"
    waiting.look()
    cluster.now = 5061.0
    waiting.end()
    waiting.end()
    assert [line.rpartition(" ")[2] for line in cluster.told] == ["node", "1:01"]
