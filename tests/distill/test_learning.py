"""Distillers that learn something themselves: their formulas at the edges, in one process."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metamixer_ray.distill import DistillConfig, Own, build_distiller, learnt_by, mean_over_places
from metamixer_ray.distill.config import DistillerName
from metamixer_ray.distill.mcl import contrast
from tests.distill.hearing import heard_by
from tests.distill.test_dml import random_logits

LEARNING: tuple[DistillerName, ...] = ("ensemble-gated", "okddip", "mcl")


@settings(max_examples=30, deadline=None)
@given(classes=st.lists(st.integers(0, 4), min_size=1, max_size=9), seed=st.integers(0, 2**31))
def test_only_images_with_another_of_their_class_are_contrasted(classes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    similarities = torch.randn(len(classes), len(classes), generator=generator).requires_grad_()
    loss = contrast(similarities, torch.tensor(classes))
    loss.backward()
    assert similarities.grad is not None
    assert torch.isfinite(similarities.grad).all()
    assert (similarities.grad.diagonal() == 0).all()
    alone = torch.tensor([classes.count(label) == 1 for label in classes])
    assert (similarities.grad[alone] == 0).all()
    assert (loss > 0) == (not alone.all() and len(classes) > 2)


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits_and_embeddings_have_finite_gradients(name: DistillerName, scale: float) -> None:
    logits = [each.requires_grad_() for each in random_logits(0, 3, 4, 5, scale)]
    embeddings = [each.requires_grad_() for each in random_logits(1, 3, 4, 6, min(scale, 1e4))]
    distillers = [build_distiller(DistillConfig(distiller=name), width=6, leads=peer == 2) for peer in range(3)]
    targets = torch.eye(5)[[0, 0, 1, 2]]
    owns = [Own(logits=z, targets=targets, embedding=h) for z, h in zip(logits, embeddings, strict=True)]
    messages = [distiller.say(own) for distiller, own in zip(distillers, owns, strict=True)]
    for peer, (distiller, own) in enumerate(zip(distillers, owns, strict=True)):
        distiller.loss(own, heard_by(peer, messages)).backward()
        learnt = learnt_by(distiller)
        leaves = [own.logits, own.embedding, *(learnt.parameters() if learnt is not None else ())]
        assert all(torch.isfinite(leaf.grad).all() for leaf in leaves if leaf.grad is not None)


def test_places_are_averaged_whatever_the_layout() -> None:
    maps = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.stack([channel.sum() / 12 for channel in image]) for image in maps])
    torch.testing.assert_close(mean_over_places(maps, "channels-first"), expected)
    torch.testing.assert_close(mean_over_places(maps.permute(0, 2, 3, 1), "channels-last"), expected)
    tokens = maps[..., :3, :].flatten(2).transpose(1, 2)
    with_class_token = torch.cat([torch.full((2, 1, 5), 1e3), tokens], dim=1)
    torch.testing.assert_close(mean_over_places(with_class_token, "tokens"), tokens.sum(1) / 9)
    vectors = maps[:, :, 0, 0].bfloat16()
    assert torch.equal(mean_over_places(vectors), vectors.float())
