"""Scores against scikit-learn and against their definitions, written again as loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch import Tensor

from metamixer_ray.evaluation import ECE_BINS, Scores, ScoreSums


def guesses(seed: int, rows: int, classes: int, sharpness: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator) * sharpness
    return logits.softmax(1), torch.randint(classes, (rows,), generator=generator)


def scored(probabilities: Tensor, labels: Tensor, parts: int = 1) -> Scores:
    sums = ScoreSums(torch.device("cpu"))
    for rows in torch.arange(len(labels)).chunk(parts):
        sums.add(probabilities[rows], labels[rows])
    return sums.scores()


def ece_by_hand(probabilities: Tensor, labels: Tensor) -> float:
    """Guo et al. 2017, equation 3, bin by bin."""
    confidence, predicted = (x.numpy() for x in probabilities.double().max(1))
    total = 0.0
    for k in range(ECE_BINS):
        low, high = k / ECE_BINS, (k + 1) / ECE_BINS
        inside = (confidence >= low) & ((confidence < high) | (k == ECE_BINS - 1))
        if inside.any():
            accuracy = np.mean(predicted[inside] == labels.numpy()[inside])
            total += inside.sum() / len(labels) * abs(accuracy - confidence[inside].mean())
    return total


cases = given(st.integers(0, 10**6), st.integers(1, 60), st.integers(2, 30), st.sampled_from([0.1, 1.0, 8.0]))


@settings(deadline=None, max_examples=50)
@cases
def test_scores_are_those_of_the_definitions(seed: int, rows: int, classes: int, sharpness: float) -> None:
    probabilities, labels = guesses(seed, rows, classes, sharpness)
    scores = scored(probabilities, labels)
    every = list(range(classes))
    assert scores.top1 == pytest.approx(accuracy_score(labels, probabilities.argmax(1)))
    if classes > 5:
        fives = top_k_accuracy_score(labels, probabilities.double(), k=5, labels=every)
        assert scores.top5 == pytest.approx(fives)
    else:
        assert scores.top5 == 1.0
    assert scores.nll == pytest.approx(
        float(np.mean([-math.log(p[y]) for p, y in zip(probabilities.tolist(), labels.tolist(), strict=True)])),
        rel=1e-6,
    )
    assert scores.ece == pytest.approx(ece_by_hand(probabilities, labels), abs=1e-6)


def test_the_log_loss_is_scikit_learns() -> None:
    probabilities, labels = guesses(0, 500, 10, 2.0)
    assert scored(probabilities, labels).nll == pytest.approx(
        log_loss(labels, probabilities.double() / probabilities.double().sum(1, keepdim=True)), rel=1e-5
    )


@settings(deadline=None, max_examples=50)
@cases
def test_scores_do_not_depend_on_how_images_are_batched(seed: int, rows: int, classes: int, sharpness: float) -> None:
    probabilities, labels = guesses(seed, rows, classes, sharpness)
    whole, parts = scored(probabilities, labels), scored(probabilities, labels, parts=4)
    assert [whole.top1, whole.top5] == [parts.top1, parts.top5]
    assert [whole.nll, whole.ece] == pytest.approx([parts.nll, parts.ece], rel=1e-9, abs=1e-12)


def test_certainty_is_scored() -> None:
    labels = torch.tensor([0, 1, 2, 0])
    right = torch.eye(3)[labels]
    assert scored(right, labels) == Scores(top1=1.0, top5=1.0, nll=0.0, ece=0.0)
    wrong = scored(right.roll(1, dims=1), labels)
    assert (wrong.top1, wrong.ece) == (0.0, 1.0)
    assert math.isfinite(wrong.nll)
    assert wrong.nll > 80


def test_rounding_above_one_stays_in_the_last_bin() -> None:
    probabilities = torch.tensor([[1.0000001, 0.0], [0.5, 0.5]])
    assert scored(probabilities, torch.tensor([0, 0])).ece == pytest.approx(0.25, abs=1e-6)


def test_a_broken_network_is_scored_as_broken() -> None:
    """A training that diverged is told so by its flags; its evaluation must not crash before."""
    probabilities, labels = guesses(0, 20, 10, 1.0)
    probabilities[3:] = torch.nan
    scores = scored(probabilities, labels)
    assert math.isnan(scores.nll)
    assert 0 <= scores.top1 <= 1
