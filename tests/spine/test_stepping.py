"""Steps with gradients that aren't finite are left out; in float16 the loss is scaled until they are."""

import copy
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from metamixer_ray.config import TrainConfig
from metamixer_ray.optimisation import OptimisationConfig, build_optimizer
from metamixer_ray.stepping import Stepper, overflow, running_statistics
from tests.spine.pool import Pool
from tests.spine.test_worker import identical, last, weights
from tests.spine.training import learn_together

HERE = "tests.spine.networks"
CPU = torch.device("cpu")
Kind = Literal["sgd", "adamw"]


def peer(
    kind: Kind, precision: Literal["float32", "fp16"] = "float32"
) -> tuple[nn.Linear, torch.optim.Optimizer, Stepper]:
    torch.manual_seed(0)
    network = nn.Linear(300, 4)
    optimizer = build_optimizer(OptimisationConfig(optimizer=(kind,)), 0, network)
    return network, optimizer, Stepper(optimizer, precision, CPU)


def loss(network: nn.Module, factor: float = 1.0) -> torch.Tensor:
    value: torch.Tensor = network(torch.linspace(-1, 1, 300)).square().sum() * factor
    return value


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("worst", [float("inf"), float("nan")])
def test_a_step_left_out_leaves_no_trace(kind: Kind, worst: float) -> None:
    """Not even the first one, after which an optimizer has no state yet."""
    (network, optimizer, stepper), (twin, other, twins) = peer(kind), peer(kind)
    for broken in (True, False, True, False):
        optimizer.zero_grad()
        stepper.backward(loss(network))
        if broken:
            assert network.weight.grad is not None
            network.weight.grad[2, 17] = worst
        stepper.step()
        assert bool(stepper.broken.isnan()) is broken
        if not broken:
            other.zero_grad()
            twins.backward(loss(twin))
            twins.step()
        assert torch.equal(network.weight, twin.weight)
        assert torch.equal(network.bias, twin.bias)


def test_a_broken_peer_stays_broken_while_its_gradients_are() -> None:
    network, _, stepper = peer("sgd")
    assert network.weight.grad is None
    stepper.backward(loss(network))
    assert network.weight.grad is not None
    # Whoever has NaN for logits has NaN for gradients as well: that was told already.
    network.weight.grad[0, 0] = torch.nan
    stepper.skip()
    assert stepper.broken == 0
    stepper.step()
    assert stepper.broken.isnan()
    stepper.skip()
    assert stepper.broken.isnan()
    network.weight.grad[0, 0] = 1.0
    stepper.skip()
    assert stepper.broken == 0


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_scale_of_float16_changes_nothing_but_overflow(kind: Kind) -> None:
    (network, optimizer, stepper), (twin, other, twins) = peer(kind, "fp16"), peer(kind)
    for step in range(4):
        optimizer.zero_grad()
        # Overflows once it is scaled by 65536, and no longer after a few steps that are left out.
        stepper.backward(loss(network, 1e30 if step == 0 else 1.0) * (1e6 if step == 0 else 1.0))
        before = copy.deepcopy(network.state_dict())
        stepper.step()
        assert stepper.broken == 0
        if step == 0:
            assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
            continue
        other.zero_grad()
        twins.backward(loss(twin))
        twins.step()
        torch.testing.assert_close(network.weight, twin.weight)
    assert stepper.state_dict()["scale"] == 32768.0


def test_a_peer_is_broken_where_no_scale_helps() -> None:
    network, optimizer, stepper = peer("sgd", "fp16")
    left_out = 0
    while not stepper.broken.isnan():
        optimizer.zero_grad()
        stepper.backward(loss(network) * torch.inf)
        stepper.step()
        left_out += 1
    assert left_out == 17  # 65536 is two to the 16th
    assert torch.isfinite(network.weight).all()


@pytest.mark.parametrize("worst", [torch.nan, torch.inf, -torch.inf])
def test_running_statistics_that_overflow_are_noticed_and_other_buffers_may_hold_anything(worst: float) -> None:
    network = nn.Sequential(
        nn.BatchNorm2d(3), nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(5), nn.Linear(2, 2)
    )
    network.register_buffer("mask", torch.tensor([[0.0, -torch.inf]]))
    running = running_statistics(network)
    assert [len(each) for each in running] == [3, 3, 5, 5]
    running[1].fill_(1e38)
    assert overflow(running) == 0
    running[3][2] = worst
    assert overflow(running).isnan()
    assert overflow(running_statistics(nn.Linear(2, 2))) == 0


def test_it_goes_on_as_if_nothing_had_happened() -> None:
    network, _, stepper = peer("sgd", "fp16")
    stepper.backward(loss(network) * torch.inf)
    stepper.step()
    _, _, again = peer("sgd", "fp16")
    again.load_state_dict(stepper.state_dict())
    assert again.state_dict() == stepper.state_dict()


@pytest.mark.parametrize("replicas", [1, 2])
def test_gradients_that_overflow_are_learnt_by_nobody(
    pool: Pool, small: Callable[..., TrainConfig], tmp_path: Path, replicas: int
) -> None:
    peers = [f"{HERE}:tiny", f"{HERE}:overflowing_once"]
    config = small(peers=peers, replicas=replicas, checkpoint_seconds=1e-9, epochs=1, train_limit=96)
    outcomes = pool.run(2 * replicas, learn_together, config, tmp_path)
    # The others hear of it with the next step, which all skip.
    assert [[row["skipped_steps"] for row in o.epochs] for o in outcomes] == [[1]] * 2 * replicas
    steps = [weights(tmp_path, f"checkpoint-epoch0000-step{s:06d}", 1)["network"] for s in (2, 3, 4, 5)]
    assert [identical(one, two) for one, two in itertools.pairwise(steps)] == [True, True, False]
    for peer in range(2):
        assert all(torch.isfinite(v).all() for v in weights(tmp_path, last(config), peer)["network"].values())


def test_a_peer_whose_gradients_overflow_for_ever_is_named(
    pool: Pool, small: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = small(peers=[f"{HERE}:tiny", f"{HERE}:overflowing_for_ever"], epochs=40)
    for outcome in pool.run(2, learn_together, config, tmp_path):
        assert re.match(r"diverged: 20 steps in a row .* peer 1 \(.*overflowing_for_ever\)", outcome.ended)
        assert len(outcome.images) == 3 + 1 + 20
