"""How teachers are imitated, and how KDCL makes them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from metamixer_ray.distill import DistillConfig
from metamixer_ray.distill.kdcl import best_shares
from metamixer_ray.distill.teaching import decoupled_divergence, divergence
from metamixer_ray.errors import ConfigError
from tests.distill.test_dml import random_logits

seeds = st.integers(0, 2**31)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, classes=st.integers(2, 20), temperature=st.floats(0.5, 10.0), scale=st.floats(0.0, 8.0))
def test_decoupled_as_in_equation_5_is_the_plain_divergence(
    seed: int, classes: int, temperature: float, scale: float
) -> None:
    logits, teacher = random_logits(seed, 2, 1, classes, scale)
    target = seed % classes
    targets = F.one_hot(torch.tensor([target]), classes).float()
    beta = float(1 - (teacher / temperature).softmax(1)[0, target])
    decoupled = decoupled_divergence(logits, teacher, targets, temperature, alpha=1.0, beta=beta)
    torch.testing.assert_close(decoupled, divergence(logits, teacher, temperature), rtol=1e-4, atol=1e-4)


def test_the_target_of_a_mixed_image_is_its_heaviest_label() -> None:
    logits, teacher = random_logits(0, 2, 4, 5, 2.0)
    mixed = torch.tensor([[0.1, 0.6, 0.3, 0.0, 0.0]]).repeat(4, 1)
    pure = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]]).repeat(4, 1)
    losses = [decoupled_divergence(logits, teacher, t, 3.0, alpha=1.0, beta=8.0) for t in (mixed, pure)]
    assert losses[0] == losses[1] > 0


@settings(max_examples=40, deadline=None)
@given(
    seed=seeds,
    peers=st.integers(2, 6),
    rows=st.integers(1, 5),
    classes=st.integers(2, 20),
    scale=st.sampled_from([0.0, 0.1, 3.0, 20.0]),
)
def test_no_mean_of_logits_fits_the_labels_better(seed: int, peers: int, rows: int, classes: int, scale: float) -> None:
    logits = torch.stack(random_logits(seed, peers, rows, classes, scale))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(rows, classes, generator=generator).pow(4)
    targets /= targets.sum(1, keepdim=True)
    shares = best_shares(logits, targets)
    assert shares.shape == (rows, peers)
    assert (shares > 0).all()
    torch.testing.assert_close(shares.sum(1), torch.ones(rows))

    def costs(weights: torch.Tensor) -> torch.Tensor:
        mean = torch.einsum("...bp,pbc->...bc", weights.double(), logits.double())
        return -(targets * mean.log_softmax(-1)).sum(-1)

    drawn = torch.rand(200, rows, peers, generator=generator).pow(3)
    corners = torch.eye(peers)[:, None].expand(peers, rows, peers)
    others = torch.cat([drawn / drawn.sum(2, keepdim=True), corners])
    assert (costs(shares) <= costs(others).amin(0) + 1e-5 * peers + 1e-6 * scale).all()


@pytest.mark.parametrize("scale", [1e6, 1e15, 1e30])
def test_logits_of_any_size_have_shares(scale: float) -> None:
    logits = torch.stack(random_logits(3, 3, 8, 10, scale))
    shares = best_shares(logits, torch.eye(10)[:8])
    assert (shares >= 0).all()
    torch.testing.assert_close(shares.sum(1), torch.ones(8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distiller", ["none", "dml", "okddip", "mcl"])
def test_decoupling_needs_a_teacher(distiller: str) -> None:
    with pytest.raises(ConfigError, match=r"--divergence dkd needs a teacher.*--distiller ensemble"):
        DistillConfig(distiller=distiller, divergence="dkd")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--dkd-beta must be a number of at least 0"):
        DistillConfig(dkd_beta=-1.0)
