"""The newest whole checkpoint is found, whatever a kill left beside it."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from metamixer_ray.checkpoint import Progress, take_snapshot
from metamixer_ray.config import TrainConfig
from metamixer_ray.errors import CheckpointError
from metamixer_ray.folder import RunFolder
from metamixer_ray.restoring import newest_checkpoint
from tests.data.drawing import picture
from tests.spine.pool import Pool
from tests.spine.training import learn_together


def _save(folder: Path, name: str, value: float) -> Path:
    target = folder / name
    target.mkdir()
    network = nn.Linear(2, 2)
    nn.init.constant_(network.weight, value)
    for peer in range(2):
        take_snapshot(peer, network, torch.optim.SGD(network.parameters(), lr=0.1), Progress(), {"seed": 0}).write(
            target
        )
    return target


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Three whole checkpoints, one of them inside an epoch, and folders that are none."""
    for value, name in enumerate(("checkpoint-epoch0002", "checkpoint-epoch0009-step000120", "checkpoint-epoch10000")):
        _save(tmp_path, name, float(value))
    for name in ("figures", "baseline", "checkpoint-of-mine"):
        (tmp_path / name).mkdir()
    return RunFolder(str(tmp_path))


def test_the_newest_is_the_one_of_the_latest_step(folder: RunFolder, tmp_path: Path) -> None:
    peers, problems = newest_checkpoint(folder, 2, tmp_path / "scratch", {"seed": 0})
    assert not problems
    assert [float(peer["network"]["weight"][0, 0]) for peer in peers] == [2.0, 2.0]


def test_a_torn_one_is_passed_over(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-epoch10000" / "peer1.json").unlink()
    (tmp_path / "checkpoint-epoch10001").mkdir()
    weights = tmp_path / "checkpoint-epoch0009-step000120" / "peer0.pt"
    weights.write_bytes(weights.read_bytes()[:100])
    peers, problems = newest_checkpoint(folder, 2, tmp_path / "scratch")
    assert [float(peer["network"]["weight"][0, 0]) for peer in peers] == [0.0, 0.0]
    wrong = ("checkpoint-epoch10001", "checkpoint-epoch10000", "checkpoint-epoch0009-step000120")
    for problem, name in zip(problems, wrong, strict=True):
        assert name in problem
        assert problem.endswith("; checkpoint-epoch0002 is used instead")


def test_none_at_all_says_what_is_wrong_with_the_newest(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint-epoch10000 belongs to another configuration: seed was 0"):
        newest_checkpoint(folder, 2, tmp_path / "scratch", {"seed": 1})
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        newest_checkpoint(RunFolder(str(tmp_path / "figures")), 2, tmp_path / "scratch")


def draw_tree(root: Path, brightness: int) -> None:
    """An ImageFolder tree of 24 images of three classes, all of them a little brighter or not."""
    for number in range(24):
        path = root / ("test" if number < 6 else "train") / f"class{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(picture(number)) // 2 + np.uint8(brightness)).save(path)


def test_images_that_changed_are_not_resumed_on(pool: Pool, small: Callable[..., TrainConfig], tmp_path: Path) -> None:
    data, begun = tmp_path / "data", "checkpoint-epoch0001"
    draw_tree(data, brightness=0)
    config = small(data=str(data), train_limit=None)
    outcomes = pool.run(2, learn_together, config, tmp_path / "run", None, begun)
    assert [o.ended for o in outcomes] == ["stopped"] * 2
    draw_tree(data, brightness=1)
    for outcome in pool.run(2, learn_together, config, tmp_path / "run", begun):
        assert re.match("refused: .* another configuration: data_fingerprint was ", outcome.ended)
        assert not outcome.images
