"""What figures say of a row."""

import numpy as np
import pytest
import torch
from hypothesis import given

from metamixer_ray.mixing import GlobalMix, MixPlan, describe_row, label_sources
from tests.mixing.plans import drawn_plans, local_mix, matrix, quick


def test_a_row_by_hand() -> None:
    boxes = np.array([[0, 0, 2, 2], [0, 0, 0, 0], [0, 0, 4, 2], [0, 0, 4, 4]])
    local = local_mix(torch.tensor([2, 3, 0, 1]), boxes, height=4, width=4)
    plan = MixPlan(4, local, GlobalMix(torch.tensor([1, 0, 3, 2]), torch.full((4,), 0.5), 2))
    mixture = describe_row(plan, 0)
    assert mixture.sources == ((1, 0.5), (0, 0.375), (2, 0.125))
    assert mixture.boxes == ((0, 0, 2, 2),)
    assert mixture.partner_boxes == ()
    assert (mixture.stage, mixture.kept) == (2, 0.5)
    assert mixture.class_weights([0, 0, 1, 1]) == {0: 0.875, 1: 0.125}
    assert mixture.caption([0, 0, 1, 1], ["cat", "dog"]) == "cat 0.88 + dog 0.12"


def test_an_unmixed_row() -> None:
    mixture = describe_row(MixPlan(4), 3)
    assert mixture.sources == ((3, 1.0),)
    assert (mixture.boxes, mixture.partner_boxes, mixture.stage, mixture.kept) == ((), (), None, None)
    assert mixture.caption([0, 0, 1, 1], ["cat", "dog"]) == "dog 1.00"


@given(drawn_plans())
@quick
def test_sources_agree_with_label_sources(drawn: tuple[MixPlan, int, int]) -> None:
    plan = drawn[0]
    weights = matrix(*label_sources(plan))
    for row in range(plan.rows):
        sources = dict(describe_row(plan, row).sources)
        assert sum(sources.values()) == pytest.approx(1, abs=1e-6)
        assert all(weights[row, source].item() == pytest.approx(weight) for source, weight in sources.items())
