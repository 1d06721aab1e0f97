"""Peers x replicas: who sits where, and who is in whose group."""

from collections import Counter
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metamixer_ray.errors import ConfigError
from metamixer_ray.mesh import Host, seats
from tests.spine.pool import Pool, RankFailed
from tests.spine.training import mesh_of, told_by_all

labels = st.dictionaries(st.sampled_from("ab"), st.sampled_from("xy"))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[dict[str, str]], int, int, list[Host]]:
    peers, replicas = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (5, 1), (2, 2), (1, 3), (2, 3), (3, 2)]))
    selectors = draw(st.lists(labels, min_size=peers, max_size=peers))
    nodes = [Host(str(number), draw(labels)) for number in range(draw(st.integers(1, peers * replicas)))]
    hosts = draw(st.lists(st.sampled_from(nodes), min_size=peers * replicas, max_size=peers * replicas))
    return selectors, peers, replicas, hosts


def fits(wanted: dict[str, str], host: Host) -> bool:
    return wanted.items() <= host.labels.items()


@settings(deadline=None, max_examples=50)
@given(worlds())
def test_every_seat_gets_a_fitting_rank_whenever_that_is_possible(
    world: tuple[list[dict[str, str]], int, int, list[Host]],
) -> None:
    selectors, peers, replicas, hosts = world
    wanted = [selectors[seat // replicas] for seat in range(peers * replicas)]
    possible = any(
        all(fits(w, hosts[rank]) for w, rank in zip(wanted, order, strict=True))
        for order in permutations(range(peers * replicas))
    )
    if not possible:
        with pytest.raises(ConfigError, match="--peer-labels"):
            seats(selectors, peers, replicas, hosts)
        return
    seating = seats(selectors, peers, replicas, hosts)
    assert sorted(seating) == list(range(peers * replicas))
    assert all(fits(w, hosts[rank]) for w, rank in zip(wanted, seating, strict=True))
    for peer in range(peers):
        # So that the first replica, which writes the checkpoints, is also the first of its process group.
        ranks = seating[peer * replicas : (peer + 1) * replicas]
        assert ranks == sorted(ranks)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_on_one_node_ranks_keep_their_order(peers: int, replicas: int, empty: bool) -> None:
    world = peers * replicas
    assert seats([{}] * peers if empty else None, peers, replicas, [Host("only")] * world) == list(range(world))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 6), st.integers(1, 4), st.data())
def test_replicas_of_a_peer_share_a_node_wherever_one_holds_them(
    peers: int, replicas: int, data: st.DataObject
) -> None:
    world = peers * replicas
    # As Ray Train numbers them: ranks of one node adjoin.
    hosts = sorted(data.draw(st.lists(st.sampled_from("abcd"), min_size=world, max_size=world)))
    seating = seats(None, peers, replicas, [Host(name) for name in hosts])
    assert sorted(seating) == list(range(world))
    rows = [seating[peer * replicas : (peer + 1) * replicas] for peer in range(peers)]
    together = sum(len({hosts[rank] for rank in row}) == 1 for row in rows)
    assert together == sum(held // replicas for held in Counter(hosts).values())


def test_a_peer_with_labels_keeps_its_replicas_together_when_another_could_take_their_node() -> None:
    hosts = [Host("a", {"kind": "x"}), Host("b", {"kind": "y"}), Host("b", {"kind": "y"}), Host("c", {"kind": "x"})]
    assert seats([{}, {"kind": "y"}], 2, 2, hosts) == [0, 3, 1, 2]
    assert seats([{}, {"kind": "x"}], 2, 2, hosts) == [1, 2, 0, 3]


@pytest.mark.parametrize("seating", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_the_groups_of_both_axes(pool: Pool, seating: list[int]) -> None:
    for rank, place in enumerate(pool.run(4, mesh_of, 2, 2, seating)):
        peer, replica = divmod(seating.index(rank), 2)
        assert place["seat"] == (peer, replica)
        # torch numbers the members of a group by their rank in the world.
        assert place["peer_group"] == sorted([seating[replica], seating[2 + replica]])
        assert place["replica_group"] == sorted([seating[2 * peer], seating[2 * peer + 1]])


def test_an_axis_of_one_has_no_group(pool: Pool) -> None:
    by_peers = pool.run(2, mesh_of, 2, 1, [0, 1])
    by_replicas = pool.run(2, mesh_of, 1, 2, [0, 1])
    assert [p["peer_group"] for p in by_peers] == [[0, 1]] * 2
    assert [p["replica_group"] for p in by_peers] == [None] * 2
    assert [p["replica_group"] for p in by_replicas] == [[0, 1]] * 2
    assert [p["peer_group"] for p in by_replicas] == [None] * 2


def test_a_world_of_another_size_is_refused(pool: Pool) -> None:
    with pytest.raises(RankFailed, match="2 peers x 2 replicas need 4 workers, not 2"):
        pool.run(2, mesh_of, 2, 2, [0, 1, 2, 3])


@given(st.lists(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x)), min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_what_each_gives_all_get(pool: Pool, values: list[object]) -> None:
    assert pool.run(3, told_by_all, values) == [values] * 3
