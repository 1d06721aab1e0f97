"""Pictures of one training: how it went, what was mixed, where each peer looks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from metamixer_ray.config import TrainConfig
from metamixer_ray.data import Splits, normalise, train_batches
from metamixer_ray.distill import Layout
from metamixer_ray.distill.layout import positions_last_channels
from metamixer_ray.mixing import MixPlan, build_mixer, mix_images, mix_targets
from metamixer_ray.networks import StagedNetwork
from metamixer_ray.preparation import READ_AS, batch_order, part_of
from metamixer_ray.randomness import numpy_generator
from metamixer_ray.tracking.figures import (
    agreement_curves,
    attention_sheet,
    describe_label,
    learning_curves,
    mixing_sheet,
)

FIGURES = ("learning_curves", "agreement", "mixing", "attention")
QUADRUPLES_SHOWN = 4
IMAGES_SHOWN = 6
DRAWS = 200


def figure_makers(
    config: TrainConfig,
    splits: Splits,
    networks: Sequence[StagedNetwork],
    rows: Sequence[Mapping[str, Any]],
    alone_rows: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Callable[[], Figure | None]]:
    """How to draw each figure of a training, by name; None where there is nothing to draw.

    ``networks`` are the trained peers, on the CPU.
    """
    return {
        "learning_curves": lambda: learning_curves(rows, alone_rows),
        "agreement": lambda: agreement_curves(rows),
        "mixing": lambda: draw_mixing(config, splits),
        "attention": lambda: draw_attention(config, splits, networks),
    }


def draw_mixing(config: TrainConfig, splits: Splits) -> Figure | None:
    """A few quadruples of the first epoch, after local mixing and after global mixing at the input.

    None when the mixer mixes nothing. The plan is one that has both stages where the mixer has both.
    """
    mixer, splits = build_mixer(config.mixing), part_of(config, splits, peer=0)
    order = batch_order(config, splits)
    batch = next(iter(train_batches(splits.train, order, config.dataset, seed=config.seed, epoch=0, replica=0)))
    count = min(4 * QUADRUPLES_SHOWN, len(batch.labels) // 4 * 4)
    if count == 0:
        return None
    height, width = batch.images.shape[-2:]
    plans = [
        mixer.draw(numpy_generator(config.seed, "figure", draw), rows=count, height=height, width=width, stages=(0,))
        for draw in range(DRAWS)
    ]
    plan = max(plans, key=lambda p: (p.local is not None) + (p.glob is not None))
    if not plan.mixed:
        return None
    images = batch.images[:count].float() / 255
    one_hot = F.one_hot(batch.labels[:count], len(splits.classes)).float()

    def captions(targets: Tensor) -> list[str]:
        return [describe_label(row.tolist(), splits.classes) for row in targets]

    def pixels(values: Tensor) -> np.ndarray:
        return (values * 255).round().clamp(0, 255).to(torch.uint8).numpy()

    local_only = MixPlan(plan.rows, plan.local, None)
    return mixing_sheet(
        pixels(images),
        pixels(mix_images(images, local_only)),
        pixels(mix_images(images, plan)),
        labels=captions(one_hot),
        local_labels=captions(mix_targets(one_hot, local_only)),
        global_labels=captions(mix_targets(one_hot, plan)),
        title=f"What {config.mixing.mixer} makes of a batch",
    )


@torch.inference_mode()
def draw_attention(config: TrainConfig, splits: Splits, networks: Sequence[StagedNetwork]) -> Figure | None:
    """Images of the split that is reported, evenly over the classes, with each peer's attention per stage.

    None when a stage's output has no places to look at.
    """
    if any("BC" in network.layouts for network in networks):
        return None
    watched = splits.watched(tested=config.test)
    labels = watched.labels
    chosen = [int((labels == c).nonzero()[0]) for c in range(len(splits.classes)) if bool((labels == c).any())][
        :IMAGES_SHOWN
    ]
    images = watched.take(torch.tensor(chosen))
    inputs = normalise(images, splits.mean, splits.std)
    attention, predictions, correct = [], [], []
    for network in networks:
        maps: dict[int, np.ndarray] = {}

        def watch(stage: int, layout: Layout, maps: dict[int, np.ndarray] = maps) -> Any:
            def keep(x: Tensor) -> Tensor:
                maps[stage] = positions_last_channels(x.float(), layout).square().mean(3).numpy()
                return x

            return keep

        network.eval()
        taps = {k: watch(k, READ_AS[layout]) for k, layout in enumerate(network.layouts, start=1)}
        probabilities = F.softmax(network(inputs, taps).float(), dim=1)
        confidence, predicted = probabilities.max(dim=1)
        attention.append([maps[k] for k in sorted(maps)])
        predictions.append(
            [f"{splits.classes[c]} {p:.2f}" for c, p in zip(predicted.tolist(), confidence.tolist(), strict=True)]
        )
        correct.append((predicted == labels[chosen]).numpy())
    return attention_sheet(
        images.numpy(),
        attention,
        names=[f"peer{i} {name}" for i, name in enumerate(config.peers)],
        labels=[splits.classes[int(c)] for c in labels[chosen]],
        predictions=predictions,
        correct=np.stack(correct),
    )
