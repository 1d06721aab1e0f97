"""The two involutions, and what the organised pairings make of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metamixer_ray.errors import ConfigError
from metamixer_ray.mixing import MixingConfig, label_sources
from metamixer_ray.mixing.quadruples import require_quadruples, swap_classes, swap_members
from tests.mixing.plans import plan_of, quick

A1, A2, B1, B2 = range(4)

quadruples = st.integers(1, 32)


def classes_of(rows: int) -> torch.Tensor:
    """Classes of a batch of quadruples in which no two quadruples share a class."""
    return torch.arange(rows) // 2


@given(quadruples)
@quick
def test_both_are_involutions_that_commute_and_stay_in_their_quadruple(count: int) -> None:
    index = torch.arange(4 * count)
    for swap in (swap_classes, swap_members):
        assert torch.equal(swap(swap(index)), index)
        assert torch.equal(swap(index) // 4, index // 4)
        assert (swap(index) != index).all()
    assert torch.equal(swap_classes(swap_members(index)), swap_members(swap_classes(index)))


def test_swaps_by_name() -> None:
    assert swap_classes(torch.tensor([A1, A2, B1, B2])).tolist() == [B1, B2, A1, A2]
    assert swap_members(torch.tensor([A1, A2, B1, B2])).tolist() == [A2, A1, B2, B1]


@given(quadruples)
@quick
def test_swap_classes_changes_every_class_and_swap_members_none(count: int) -> None:
    index = torch.arange(4 * count)
    classes = classes_of(4 * count)
    assert (classes[swap_classes(index)] != classes).all()
    assert torch.equal(classes[swap_members(index)], classes)


@pytest.mark.parametrize(("rows", "fits"), [(4, True), (128, True), (0, False), (3, False), (30, False)])
def test_only_multiples_of_four_are_quadruples(rows: int, fits: bool) -> None:
    if fits:
        assert require_quadruples(rows) is None
    else:
        with pytest.raises(ConfigError, match=rf"--batch-size gives each replica {rows} rows.*--pairing free"):
            require_quadruples(rows)


@given(
    st.sampled_from(("cross-class", "within-class")),
    quadruples,
    st.integers(0, 10**9),
    st.tuples(st.booleans(), st.booleans()),
)
@quick
def test_organised_mixtures_hold_at_most_two_classes_and_four_images(
    pairing: str, count: int, seed: int, switches: tuple[bool, bool]
) -> None:
    local, glob = switches
    config = MixingConfig(pairing=pairing, local_probability=local, global_probability=glob)  # type: ignore[arg-type]
    rows = 4 * count
    indices, _ = label_sources(plan_of(config, rows=rows, seed=seed))
    classes = classes_of(rows)[indices]
    assert (indices // 4 == torch.arange(rows)[:, None] // 4).all()
    assert max(len(set(row)) for row in classes.tolist()) <= 2
    if local and glob:
        assert all(len(set(row)) == 4 for row in indices.tolist())


@pytest.mark.parametrize(
    ("pairing", "local_partner", "global_partner"),
    [
        ("cross-class", [B1, B2, A1, A2], [A2, A1, B2, B1]),
        ("within-class", [A2, A1, B2, B1], [B1, B2, A1, A2]),
    ],
)
def test_who_meets_whom(pairing: str, local_partner: list[int], global_partner: list[int]) -> None:
    config = MixingConfig(pairing=pairing, local_probability=1, global_probability=1)  # type: ignore[arg-type]
    plan = plan_of(config, rows=4)
    assert plan.local is not None
    assert plan.glob is not None
    assert plan.local.partners[0].tolist() == local_partner
    assert plan.glob.partner.tolist() == global_partner


def test_free_pairs_are_permutations_that_leave_the_quadruple() -> None:
    plan = plan_of(MixingConfig(pairing="free", local_probability=1, global_probability=1), rows=64)
    assert plan.local is not None
    assert plan.glob is not None
    for partner in (plan.local.partners[0], plan.glob.partner):
        assert sorted(partner.tolist()) == list(range(64))
        assert (partner // 4 != torch.arange(64) // 4).any()
    assert not torch.equal(plan.local.partners[0], plan.glob.partner)
