"""KDCL's general teacher: shares by the peers' errors on the validation split."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from metamixer_ray.checkpoint import read_peer
from metamixer_ray.config import TrainConfig
from metamixer_ray.data import load_splits, normalise
from metamixer_ray.distill import (
    Control,
    DistillConfig,
    ErrorProducts,
    Exchange,
    GeneralTeacher,
    Own,
    build_distiller,
    least_error_shares,
)
from metamixer_ray.errors import ConfigError
from metamixer_ray.preparation import build_peers
from tests.spine.pool import Pool
from tests.spine.training import learn_together

CLASSES, ROWS, T = 4, 9, 2.0
BATCHES = 3


def held_out(peer: int, batch: int) -> tuple[Tensor, Tensor]:
    """A peer's probabilities and the labels of a batch; later peers are better."""
    labels = torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(batch))
    noise = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(100 * peer + batch + 7))
    return torch.softmax(noise + (1 + peer) * F.one_hot(labels, CLASSES), dim=1), labels


def logits_of(peer: int) -> Tensor:
    return torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(50 + peer))


def learn_generally(peers: int, turned: bool) -> dict[str, Any]:
    """The job of one rank: its share, loss and gradient before and after the errors are measured."""
    order = list(range(peers))[::-1] if turned else list(range(peers))
    peer = order[dist.get_rank()]
    group = dist.group.WORLD
    assert group is not None
    teacher = build_distiller(DistillConfig(distiller="kdcl-general", temperature=T), peers=peers)
    assert isinstance(teacher, GeneralTeacher)
    results: dict[str, Any] = {"peer": peer, "shares": [], "losses": [], "gradients": []}
    for step in range(2):
        exchange = Exchange(group, "cpu")
        logits = logits_of(peer).requires_grad_()
        own = Own(logits=logits, targets=torch.full((ROWS, CLASSES), 1 / CLASSES))
        heard = exchange.start(teacher.say(own), control=Control(step=step), reduce=teacher.reduce).wait()
        loss = teacher.loss(own, heard)
        (gradient,) = torch.autograd.grad(loss, logits)
        results["shares"].append(float(teacher.share))
        results["losses"].append(loss.item())
        results["gradients"].append(gradient)
        errors = ErrorProducts(group, order, torch.device("cpu"))
        for batch in range(BATCHES):
            errors.add(*held_out(peer, batch))
        teacher.share.fill_(errors.shares(None)[peer])
    return results


@pytest.mark.parametrize(("peers", "turned"), [(2, False), (3, False), (3, True)])
def test_shares_loss_and_gradient_are_the_papers(peers: int, turned: bool, pool: Pool) -> None:
    outcomes = sorted(pool.run(peers, learn_generally, peers, turned), key=lambda outcome: outcome["peer"])
    errors = []
    for peer in range(peers):
        told = [held_out(peer, batch) for batch in range(BATCHES)]
        errors.append(torch.cat([p.double() - F.one_hot(labels, CLASSES) for p, labels in told]))
    products = np.array([[float((a * b).sum(1).mean()) for b in errors] for a in errors])
    inverse = np.linalg.inv(products)
    shares = [[1 / peers] * peers, list(inverse.sum(1) / inverse.sum())]
    assert shares[1][-1] > shares[1][0]
    for step, wanted in enumerate(shares):
        found = [outcome["shares"][step] for outcome in outcomes]
        assert found == pytest.approx(wanted, abs=2e-3)
        assert sum(found) == pytest.approx(1, abs=1e-5)
        teacher = sum(share * logits_of(peer).double() for peer, share in enumerate(found))
        assert isinstance(teacher, Tensor)
        target = F.softmax(teacher / T, dim=1)
        for peer, outcome in enumerate(outcomes):
            logits = logits_of(peer).double().requires_grad_()
            loss = T**2 * (target * (target.log() - F.log_softmax(logits / T, dim=1))).sum(1).mean()
            (gradient,) = torch.autograd.grad(loss, logits)
            assert outcome["losses"][step] == pytest.approx(loss.item(), rel=1e-4)
            assert torch.allclose(outcome["gradients"][step].double(), gradient, atol=1e-6)


@given(st.integers(2, 5), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_no_other_shares_have_less_error(peers: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    errors = rng.normal(size=(peers, 40)) * rng.uniform(0.2, 2, size=(peers, 1))
    products = errors @ errors.T
    found = least_error_shares(torch.from_numpy(products)).numpy()
    assert found.sum() == pytest.approx(1)
    best = minimize(
        lambda a: a @ products @ a,
        np.full(peers, 1 / peers),
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
        options={"ftol": 1e-12},
    )
    assert found @ products @ found <= best.fun * (1 + 1e-3)


def test_peers_of_equal_errors_have_equal_shares() -> None:
    for products in (torch.zeros(3, 3), torch.ones(3, 3), torch.eye(3)):
        assert least_error_shares(products.double()).tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_training_measures_after_every_epoch(
    pool: Pool, small: Callable[..., TrainConfig], tmp_path: Path, replicas: int
) -> None:
    """Also where it evaluates less often: the shares in the checkpoint are those of the networks in it."""
    names = ["tests.spine.networks:tiny", "tests.spine.networks:wide", "tests.spine.networks:tiny"][: 4 - replicas]
    config = small(
        peers=names,
        distiller="kdcl-general",
        validation_fraction=0.1,
        evaluate_every=5,
        epochs=3,
        replicas=replicas,
        kd_warmup_epochs=0,
    )
    outcomes = pool.run(config.workers, learn_together, config, tmp_path)
    assert all([row["scores"] is None for row in o.epochs] == [True, True, False] for o in outcomes)
    splits = load_splits(config.dataset)
    validation = splits.validation
    assert validation is not None
    for epoch in (1, 3):
        networks = build_peers(config, classes=len(splits.classes), image_size=splits.train.image_size)
        saved = [read_peer(tmp_path / f"checkpoint-epoch{epoch:04d}", peer) for peer in range(len(names))]
        inputs = normalise(validation.take(torch.arange(len(validation))), splits.mean, splits.std)
        errors = []
        for network, content in zip(networks, saved, strict=True):
            network.network.load_state_dict(content["network"])
            with torch.no_grad():
                probabilities = F.softmax(network.eval()(inputs), dim=1).double()
            errors.append((probabilities - F.one_hot(validation.labels, len(splits.classes))).flatten())
        flat = torch.stack(errors)
        shares = [float(content["distiller"]["share"]) for content in saved]
        assert shares == pytest.approx(least_error_shares(flat @ flat.T).tolist(), abs=1e-3)
        assert shares != pytest.approx([1 / len(names)] * len(names), abs=1e-3)
        assert all(len(content["optimizer"]["param_groups"]) == 1 for content in saved)


def test_without_a_validation_split_it_is_refused(small: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match=r"--distiller kdcl-general .* --validation-fraction 0\.1"):
        small(distiller="kdcl-general")


def test_a_burn_in_without_end_is_refused(small: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match="--kd-burn-in-epochs 2"):
        small(kd_burn_in_epochs=2, epochs=2)
