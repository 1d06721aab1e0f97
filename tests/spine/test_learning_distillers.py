"""Distillers that learn something themselves, in whole trainings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metamixer_ray.checkpoint import read_peer
from metamixer_ray.config import TrainConfig
from metamixer_ray.data import load_splits
from metamixer_ray.distill import learnt_by
from metamixer_ray.networks import NetworkConfig, build_network, embedding_width, keep_features
from metamixer_ray.preparation import build_peers, peer_distiller
from tests.spine.pool import Pool
from tests.spine.training import Outcome, learn_together

Make = Callable[..., TrainConfig]
HERE = "tests.spine.networks"
PEERS = [f"{HERE}:tiny", f"{HERE}:wide", f"{HERE}:tiny"]


def last(config: TrainConfig, folder: Path) -> list[dict[str, Any]]:
    """What the last checkpoint holds, per peer."""
    return [read_peer(folder / f"checkpoint-epoch{config.epochs:04d}", peer) for peer in range(len(config.peers))]


@pytest.mark.parametrize("distiller", ["dml", "ensemble-gated", "okddip", "mcl"])
def test_what_is_learnt_beside_the_network_is_kept_beside_it(
    pool: Pool, small: Make, tmp_path: Path, distiller: str
) -> None:
    config = small(peers=PEERS, distiller=distiller, kd_warmup_epochs=0)
    pool.run(3, learn_together, config, tmp_path)
    splits = load_splits(config.dataset)
    size = splits.train.image_size
    networks = build_peers(config, classes=len(splits.classes), image_size=size)
    for peer, (network, saved) in enumerate(zip(networks, last(config, tmp_path), strict=True)):
        assert saved["network"].keys() == network.network.state_dict().keys()
        initial = learnt_by(peer_distiller(config, network, peer, image_size=size))
        # Plain distillers have none, nor has the leader of okddip.
        assert (initial is None) == (distiller == "dml" or (distiller == "okddip" and peer == 2))
        assert ("distiller" in saved) == (initial is not None)
        assert len(saved["optimizer"]["param_groups"]) == (1 if initial is None else 2)
        for name, value in ({} if initial is None else initial.state_dict()).items():
            assert (saved["distiller"][name] - value).abs().max() > 1e-5


def test_what_is_learnt_follows_the_peers_schedule(pool: Pool, small: Make, tmp_path: Path) -> None:
    # On the steps without an exchange nothing is learnt beside the network.
    config = small(peers=PEERS[:2], distiller="mcl", lr=[0.05, 0.02], schedule="constant", replicas=2, exchange_every=2)
    pool.run(4, learn_together, config, tmp_path)
    rates = [[group["lr"] for group in saved["optimizer"]["param_groups"]] for saved in last(config, tmp_path)]
    assert rates == [[0.05, 0.05], [0.02, 0.02]]


def test_the_last_peer_leads_wherever_it_sits(pool: Pool, small: Make, tmp_path: Path) -> None:
    config = small(peers=PEERS, distiller="okddip", epochs=1, kd_warmup_epochs=0, lr=0.01, momentum=0, nesterov=False)

    def trained(name: str, seating: list[int]) -> list[Outcome]:
        return pool.run(3, learn_together, config, tmp_path / name, None, None, seating)

    plain, turned = trained("plain", [0, 1, 2]), trained("turned", [2, 0, 1])
    assert [outcome.peer for outcome in turned] == [1, 2, 0]
    for one, other in zip(last(config, tmp_path / "plain"), last(config, tmp_path / "turned"), strict=True):
        torch.testing.assert_close(one["network"], other["network"], rtol=1e-4, atol=1e-5)
    losses = [{o.peer: o.epochs[0]["train"]["kd"] for o in outcomes} for outcomes in (plain, turned)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("name", ["resnet8", "wrn16-2", "vgg16-cifar", "shufflenetv2", f"{HERE}:tiny"])
def test_the_embedding_is_as_wide_as_the_last_stage(name: str) -> None:
    network = build_network(name, classes=3, image_size=32, config=NetworkConfig())
    features: dict[int, torch.Tensor] = {}
    end = len(network.stage_names)
    network.eval()(torch.rand(2, 3, 32, 32), keep_features(features, [end]))
    assert embedding_width(network, image_size=32) == features[end].shape[1]
