"""Distillers in one process: formulas, registry, dtypes."""

import ast
import typing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import metamixer_ray.distill
from metamixer_ray.distill import Control, DistillConfig, Exchange, build_distiller, distiller_names
from metamixer_ray.distill.config import DistillerName
from tests.distill import textbook
from tests.distill.hearing import heard_by, own_view


def random_logits(seed: int, peers: int, rows: int, classes: int, scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(rows, classes, generator=generator) for _ in range(peers)]


cases = given(
    seed=st.integers(0, 2**31),
    peers=st.integers(2, 6),
    rows=st.integers(1, 9),
    classes=st.integers(2, 20),
    scale=st.floats(0.0, 20.0),
    temperature=st.floats(0.5, 10.0),
)


@settings(max_examples=60, deadline=None)
@cases
def test_dml_from_means_is_the_pairwise_loss(
    seed: int, peers: int, rows: int, classes: int, scale: float, temperature: float
) -> None:
    logits = random_logits(seed, peers, rows, classes, scale)
    distiller = build_distiller(DistillConfig(temperature=temperature))
    own = logits[0].clone().requires_grad_()
    loss = distiller.loss(own_view(own), heard_by(0, [distiller.say(own_view(each)) for each in logits]))
    (gradient,) = torch.autograd.grad(loss, own)
    expected, expected_gradient = textbook.mutual_learning(logits, 0, temperature)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=1e-5 * temperature**2)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6 * temperature)


@settings(max_examples=30, deadline=None)
@cases
def test_dml_is_zero_between_equals_and_blind_to_shifts(
    seed: int, peers: int, rows: int, classes: int, scale: float, temperature: float
) -> None:
    (logits,) = random_logits(seed, 1, rows, classes, scale)
    distiller = build_distiller(DistillConfig(temperature=temperature))
    own = (logits + 3.0).requires_grad_()
    loss = distiller.loss(own_view(own), heard_by(0, [distiller.say(own_view(logits))] * peers))
    loss.backward()
    assert own.grad is not None
    assert loss.item() == pytest.approx(0, abs=2e-5 * temperature**2)
    assert own.grad.abs().max().item() < 1e-5 * temperature


def test_gradient_keeps_its_scale_when_the_temperature_grows() -> None:
    logits = random_logits(0, 2, 8, 10, 1.0)
    sizes = []
    for temperature in (20.0, 40.0):
        distiller = build_distiller(DistillConfig(temperature=temperature))
        own = logits[0].clone().requires_grad_()
        distiller.loss(own_view(own), heard_by(0, [distiller.say(own_view(each)) for each in logits])).backward()
        assert own.grad is not None
        sizes.append(own.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", distiller_names())
def test_messages_and_losses_are_float32_even_under_autocast(name: DistillerName, dtype: torch.dtype) -> None:
    distiller = build_distiller(DistillConfig(distiller=name))
    logits = [each.to(dtype).requires_grad_() for each in random_logits(1, 3, 4, 5, 2.0)]
    with torch.autocast("cpu", torch.bfloat16):
        messages = [distiller.say(own_view(each)) for each in logits]
        loss = distiller.loss(own_view(logits[0]), heard_by(0, messages))
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert all(t.dtype == torch.float32 and not t.requires_grad for m in messages for t in m.values())


@pytest.mark.parametrize("name", distiller_names())
def test_a_lone_peer_has_no_loss(name: DistillerName) -> None:
    distiller = build_distiller(DistillConfig(distiller=name))
    logits = random_logits(2, 1, 4, 5, 1.0)[0].requires_grad_()
    loss = distiller.loss(own_view(logits), heard_by(0, [distiller.say(own_view(logits))]))
    assert loss.item() == 0
    assert not loss.requires_grad


def test_independent_peers_say_nothing() -> None:
    distiller = build_distiller(DistillConfig(distiller="none"))
    assert distiller.say(own_view(torch.ones(2, 3))) == {}
    assert distiller.reduce == "mean"


def test_extreme_logits_give_finite_messages_and_infinite_ones_are_reported() -> None:
    distiller = build_distiller(DistillConfig())
    extreme = distiller.say(own_view(torch.tensor([[1e4, -1e4, 0.0]])))
    assert all(torch.isfinite(tensor).all() for tensor in extreme.values())
    infinite = distiller.say(own_view(torch.tensor([[0.0, 1.0, float("-inf")]])))
    heard = Exchange(None, "cpu").start(infinite, control=Control(step=0)).wait()
    assert heard.control.nonfinite == 1


def test_registry_and_option_name_the_same_distillers() -> None:
    option = typing.get_type_hints(DistillConfig)["distiller"]
    assert set(typing.get_args(option)) == set(distiller_names())


def test_the_package_can_be_used_without_ray_and_mlflow() -> None:
    imported = set()
    for file in Path(metamixer_ray.distill.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    assert "torch" in imported
    assert not imported & {"ray", "mlflow"}
