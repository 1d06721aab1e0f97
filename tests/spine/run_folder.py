"""Run folders without a training: weights as they are drawn, with running statistics of real images."""

from pathlib import Path
from typing import Any

import torch

from metamixer_ray.checkpoint import Progress, take_snapshot
from metamixer_ray.config import TrainConfig, from_settings
from metamixer_ray.data import Splits, load_splits, normalise
from metamixer_ray.folder import RunFolder
from metamixer_ray.networks import StagedNetwork
from metamixer_ray.preparation import build_peers
from metamixer_ray.restoring import checkpoint_identity
from metamixer_ray.runs import data_facts, write_run


def make_run(place: Path, *peers: str, **settings: Any) -> tuple[RunFolder, list[StagedNetwork], Splits]:
    """A run folder of ``peers`` on digits of 8 px, its networks in evaluation mode, and its data."""
    config: TrainConfig = from_settings(
        {"peers": list(peers), "image_size": 8, "precision": "float32", "statistics": "none", **settings}
    )
    splits = load_splits(config.dataset)
    folder = RunFolder(str(place))
    write_run(folder, config, data_facts(splits))
    checkpoint = place / "checkpoint-epoch0001"
    checkpoint.mkdir()
    networks = build_peers(config, classes=len(splits.classes), image_size=8)
    images = normalise(splits.train.take(torch.arange(64)), splits.mean, splits.std)
    for peer, network in enumerate(networks):
        with torch.no_grad():
            network.train()(images)
        network.eval()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        take_snapshot(peer, network.network, optimizer, Progress(), checkpoint_identity(config, splits)).write(
            checkpoint
        )
    return folder, networks, splits
