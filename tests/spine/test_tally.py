"""What is counted of several peers, against loops over the images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metamixer_ray.tally import Tally


def counted(each: Tensor, labels: Tensor, parts: int = 1) -> tuple[dict, dict]:  # type: ignore[type-arg]
    peers, _, classes = each.shape
    tally = Tally(peers, classes, torch.device("cpu"))
    for rows in torch.arange(len(labels)).chunk(parts):
        tally.add(each[:, rows], labels[rows])
    return tally.scores([f"peer{i}" for i in range(peers)]), tally.details([f"class {c}" for c in range(classes)])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 40), st.integers(2, 6), st.integers(1, 3))
def test_all_counts_are_those_of_a_loop(seed: int, peers: int, rows: int, classes: int, parts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    each = (3 * torch.randn(peers, rows, classes, generator=generator)).softmax(2)
    labels = torch.randint(classes, (rows,), generator=generator)
    scores, details = counted(each, labels, parts)
    together = [*each.numpy(), each.numpy().mean(axis=0)][: peers + (peers > 1)]
    told = [[*row["peers"], row["ensemble"]] for row in details["per_class"]]
    for at, probabilities in enumerate(together):
        predicted = [int(np.argmax(p)) for p in probabilities]
        for c in range(classes):
            mine = [p == c for p, y in zip(predicted, labels.tolist(), strict=True) if y == c]
            assert details["per_class"][c]["images"] == len(mine)
            assert told[c][at] == (pytest.approx(sum(mine) / len(mine)) if mine else None)
        bins = [*details["calibration"]["peers"], details["calibration"]["ensemble"]][at]
        for k in range(15):
            inside = [i for i, p in enumerate(probabilities) if min(int(max(p) * np.float32(15)), 14) == k]
            assert bins["images"][k] == len(inside)
            right = [predicted[i] == int(labels[i]) for i in inside]
            assert bins["accuracy"][k] == (pytest.approx(np.mean(right)) if inside else None)
            sure = [max(probabilities[i]) for i in inside]
            assert bins["confidence"][k] == (pytest.approx(np.mean(sure), rel=1e-5) if inside else None)
    same = [[np.mean([np.argmax(a) == np.argmax(b) for a, b in zip(x, y, strict=True)]) for y in each] for x in each]
    np.testing.assert_allclose(details["pairwise_agreement"], same)
    alike = [len({int(np.argmax(p[i])) for p in each}) == 1 for i in range(rows)]
    assert scores["images"] == rows
    assert scores["agreement"] == (pytest.approx(np.mean(alike)) if peers > 1 else None)
    assert (scores["ensemble"] is None) == (peers == 1)
