"""Feature statistics in one process: what they read, and that means are enough."""

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metamixer_ray.distill import (
    attention_agreement,
    attention_map,
    feature_statistics,
    read_layout,
    similarity_matrix,
    statistics_loss,
    statistics_message,
)
from metamixer_ray.errors import ConfigError
from tests.distill import textbook
from tests.distill.hearing import heard_by

KINDS: tuple[Literal["attention", "similarity"], ...] = ("attention", "similarity")
Kind = Literal["attention", "similarity"]


def random_maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    channels=st.integers(1, 6),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    grid=st.integers(2, 5),
    channels_last=st.booleans(),
)
def test_attention_map_is_the_papers_for_every_size_and_memory_format(
    seed: int, rows: int, channels: int, height: int, width: int, grid: int, channels_last: bool
) -> None:
    maps = random_maps(seed, rows, channels, height, width)
    stored = maps.contiguous(memory_format=torch.channels_last) if channels_last else maps
    got = attention_map(stored, grid, "channels-first")
    assert got.shape == (rows, grid * grid)
    assert (got >= 0).all()
    torch.testing.assert_close(got.norm(dim=1), torch.ones(rows))
    torch.testing.assert_close(got.double(), textbook.attention_map(maps.double(), grid), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    peers=st.integers(2, 5),
    rows=st.integers(1, 6),
    kind=st.sampled_from(KINDS),
    dead=st.booleans(),
)
def test_losses_from_means_are_the_pairwise_losses(seed: int, peers: int, rows: int, kind: Kind, dead: bool) -> None:
    features = [[random_maps(seed + peer, rows, 3 + peer, 6, 6)] for peer in range(peers)]
    if dead:
        features[1][0][0] = 0
    own_features = [stage.clone().requires_grad_() for stage in features[0]]
    own = feature_statistics(own_features, kind, grid=3)
    said = [statistics_message(feature_statistics(stages, kind, grid=3)) for stages in features]
    loss = statistics_loss(own, heard_by(0, said))
    gradients = torch.autograd.grad(loss, own_features)
    expected, expected_gradients = textbook.statistics(kind, features, 0, 3)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 100.0))
def test_scale_does_not_matter(kind: Kind, seed: int, scale: float) -> None:
    maps = random_maps(seed, 4, 5, 8, 8)
    (one,) = feature_statistics([maps], kind, grid=4).values()
    (other,) = feature_statistics([maps * scale], kind, grid=4).values()
    # Below a mean square of 1e-8 maps fade to uniform by design; at 1e-4 that is just visible.
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dead_features_give_finite_statistics_and_gradients(kind: Kind, channels_last: bool) -> None:
    features = random_maps(0, 3, 5, 8, 8)
    features[1] = 0
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    features.requires_grad_()
    own = feature_statistics([features], kind, grid=4)
    others = feature_statistics([random_maps(1, 3, 5, 8, 8)], kind, grid=4)
    loss = statistics_loss(own, heard_by(0, [statistics_message(own), statistics_message(others)]))
    loss.backward()
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()
    if kind == "attention":
        torch.testing.assert_close(own["attention/0"][1], torch.full((16,), 0.25))
    else:
        assert own["similarity/0"][1].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_half_precision_features_give_float32_statistics(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    # Squares of these overflow float16.
    features = (500 * random_maps(0, 4, 16, 8, 8)).to(dtype).contiguous(memory_format=memory_format)
    with torch.autocast("cpu", torch.bfloat16):
        attention, similar = attention_map(features, 4), similarity_matrix(features)
    assert attention.dtype == similar.dtype == torch.float32
    torch.testing.assert_close(attention, attention_map(features.float(), 4), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(similar, similarity_matrix(features.float()), rtol=1e-3, atol=1e-4)


def test_similarity_is_the_cosine_of_pooled_features() -> None:
    maps = random_maps(0, 5, 7, 4, 4)
    got = similarity_matrix(maps)
    torch.testing.assert_close(got, textbook.similarity(maps))
    torch.testing.assert_close(got.diagonal(), torch.ones(5))
    torch.testing.assert_close(got, got.T)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 64, 8, 8), "channels-first"),
        ((2, 64, 8, 4), "channels-first"),
        ((2, 7, 7, 768), "channels-last"),
        ((2, 8, 8, 8), "channels-first"),
        ((2, 196, 192), "tokens"),
        ((2, 197, 192), "tokens"),
    ],
)
def test_layout_is_told_from_the_shape(shape: tuple[int, ...], layout: str) -> None:
    assert read_layout(torch.zeros(shape)) == layout


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_of_one_map_reads_the_same(kind: Kind) -> None:
    maps = random_maps(0, 3, 10, 6, 6)
    last = maps.permute(0, 2, 3, 1).contiguous()
    tokens = last.flatten(1, 2)
    with_class_token = torch.cat([torch.full((3, 1, 10), 9.0), tokens], dim=1)
    stages = [maps, maps.contiguous(memory_format=torch.channels_last), last, tokens, with_class_token]
    expected, *others = feature_statistics(stages, kind, grid=3).values()
    for other in others:
        torch.testing.assert_close(other, expected)


def test_a_named_layout_wins_over_the_shape() -> None:
    maps = random_maps(0, 2, 8, 8, 5)
    assert read_layout(maps) == "channels-last"
    expected = F.normalize(F.adaptive_avg_pool2d(maps.square().mean(1), 4).flatten(1), dim=1)
    torch.testing.assert_close(attention_map(maps, 4, "channels-first"), expected)


@pytest.mark.parametrize(
    ("shape", "layout", "says"),
    [
        ((2, 10), "auto", "neither maps nor tokens"),
        ((2, 15, 8), "auto", "15 tokens"),
        ((2, 16, 8), "channels-last", "cannot be read as channels-last"),
        ((2, 3, 4, 4), "tokens", "cannot be read as tokens"),
    ],
)
def test_unreadable_features_say_what_to_do(
    shape: tuple[int, ...], layout: Literal["auto", "channels-last", "tokens"], says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        attention_map(torch.ones(shape), 4, layout)
    assert "--statistics none" in str(caught.value)
    assert "--stage-names" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_agreement_is_one_between_equals_and_less_otherwise(kind: Kind) -> None:
    stages = [random_maps(0, 4, 5, 8, 8), random_maps(1, 4, 5, 4, 4)]
    changed = [stages[0], random_maps(2, 4, 5, 4, 4)]
    own, other = (feature_statistics(each, kind, grid=4) for each in (stages, changed))
    message = statistics_message(own)
    same = attention_agreement(own, heard_by(0, [message] * 3))
    partly = attention_agreement(own, heard_by(0, [message, statistics_message(other)]))
    torch.testing.assert_close(same, torch.ones(2))
    assert partly[0].item() == pytest.approx(1)
    assert partly[1] < 0.999
    assert not same.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_peer_has_no_statistics_loss(kind: Kind) -> None:
    own = feature_statistics([random_maps(0, 4, 5, 8, 8)], kind, grid=4)
    heard = heard_by(0, [statistics_message(own)])
    assert statistics_loss(own, heard).item() == 0
    assert attention_agreement(own, heard).shape == (0,)


def test_no_statistics_are_none() -> None:
    assert feature_statistics([random_maps(0, 2, 3, 4, 4)], "none", grid=4) == {}
    assert statistics_message({}) == {}
    assert statistics_loss({}, heard_by(0, [{}, {}])).item() == 0


def test_messages_carry_no_gradient() -> None:
    features = random_maps(0, 4, 5, 8, 8).requires_grad_()
    for kind in KINDS:
        own = feature_statistics([features], kind, grid=4)
        assert all(tensor.requires_grad for tensor in own.values())
        assert not any(tensor.requires_grad for tensor in statistics_message(own).values())
