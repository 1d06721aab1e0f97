"""Learning rates against torch's own schedulers, and one optimizer per peer."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from metamixer_ray.optimisation import OptimisationConfig, build_optimizer, for_peer, learning_rate


def stepped(scheduler: LRScheduler, epochs: int) -> list[float]:
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no optimizer step between the scheduler's
        for _ in range(epochs + 1):
            rates.append(scheduler.get_last_lr()[0])
            scheduler.step()
    return rates


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.floats(1e-3, 1.0))
def test_cosine_is_torchs_at_every_epoch(epochs: int, lr: float) -> None:
    config = OptimisationConfig(lr=(lr,), schedule=("cosine",))
    torchs = stepped(CosineAnnealingLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr), epochs), epochs)
    ours = [learning_rate(config, 0, epoch, epochs) for epoch in range(epochs + 1)]
    assert ours == pytest.approx(torchs, rel=1e-6, abs=1e-9 * lr)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([4, 20, 200, 300]), st.sampled_from([0.1, 0.2, 0.5]))
def test_milestones_are_torchs_at_every_epoch(epochs: int, decay: float) -> None:
    config = OptimisationConfig(schedule=("milestones",), lr_decay=decay)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    torchs = stepped(MultiStepLR(optimizer, [epochs // 2, 3 * epochs // 4], gamma=decay), epochs)
    ours = [learning_rate(config, 0, epoch, epochs) for epoch in range(epochs + 1)]
    assert ours == pytest.approx(torchs)
    inside = [learning_rate(config, 0, epoch + 0.999, epochs) for epoch in range(epochs)]
    assert inside == ours[:-1]


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(["cosine", "milestones", "constant"]), st.floats(0.1, 5), st.floats(0, 1))
def test_warm_up_rises_linearly_to_the_peak(schedule: str, warmup: float, share: float) -> None:
    config = OptimisationConfig(schedule=(schedule,), lr_warmup_epochs=warmup, lr=(0.4,))  # type: ignore[arg-type]
    if share < 1:
        assert learning_rate(config, 0, share * warmup, 20) == pytest.approx(0.4 * share)
    assert learning_rate(config, 0, warmup, 20) == pytest.approx(0.4)


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 20), st.floats(0, 20), st.floats(0, 3))
def test_after_warm_up_the_rate_never_rises(one: float, other: float, warmup: float) -> None:
    first, second = sorted((max(one, warmup), max(other, warmup)))
    for schedule in ("cosine", "milestones", "constant"):
        config = OptimisationConfig(schedule=(schedule,), lr_warmup_epochs=warmup)  # type: ignore[arg-type]
        assert learning_rate(config, 0, first, 20) >= learning_rate(config, 0, second, 20) >= 0


def test_each_peer_has_its_own() -> None:
    config = OptimisationConfig(
        optimizer=("sgd", "adamw"),
        lr=(0.1, 0.001),
        weight_decay=(1e-4, 0.05),
        schedule=("constant", "cosine"),
        momentum=0.8,
        nesterov=True,
    )
    network = nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    sgd, adamw = (build_optimizer(config, peer, network) for peer in range(2))
    assert isinstance(sgd, torch.optim.SGD)
    assert isinstance(adamw, torch.optim.AdamW)
    chosen = {k: sgd.param_groups[0][k] for k in ("lr", "weight_decay", "momentum", "nesterov")}
    assert chosen == {"lr": 0.1, "weight_decay": 1e-4, "momentum": 0.8, "nesterov": True}
    assert {k: adamw.param_groups[0][k] for k in ("lr", "weight_decay", "betas")} == {
        "lr": 0.001,
        "weight_decay": 0.05,
        "betas": (0.8, 0.999),
    }
    assert [len(o.param_groups[0]["params"]) for o in (sgd, adamw)] == [1, 1]
    assert learning_rate(config, 0, 10, 20) == 0.1
    assert learning_rate(config, 1, 10, 20) == pytest.approx(0.0005)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 9))
def test_one_value_stands_for_all_peers(peer: int) -> None:
    assert for_peer(("a",), peer) == "a"
    assert for_peer(tuple(range(10)), peer) == peer
