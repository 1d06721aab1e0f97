"""What only a GPU can show. Run with ``pytest -m gpu`` where there is one."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from metamixer_ray.checkpoint import Progress
from metamixer_ray.config import TrainConfig
from metamixer_ray.data import load_splits, train_batches
from metamixer_ray.distill import Control
from metamixer_ray.mesh import build_mesh
from metamixer_ray.meters import Meters
from metamixer_ray.peer import set_up
from metamixer_ray.worker import learn, train_epoch
from tests.spine.training import FolderSession

Make = Callable[..., TrainConfig]
pytestmark = pytest.mark.gpu


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[torch.device]:
    """A process group of one, on the first GPU."""
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1, device_id=device)
    yield device
    dist.destroy_process_group()


def test_a_step_never_waits_for_the_device(small: Make, alone: torch.device) -> None:
    config = small(peers=["resnet8"], distiller="none", epochs=1, train_limit=128, image_size=16, precision="auto")
    peer = set_up(config, build_mesh(1, 1, alone, [0]), alone, load_splits(config.dataset))
    peer.forward.train()
    meters = Meters()
    batches = train_batches(peer.splits.train, peer.order, config.dataset, seed=0, epoch=0, replica=0)
    for number, batch in enumerate(batches):
        # The first steps choose kernels, allocate, and agree on shapes.
        torch.cuda.set_sync_debug_mode("error" if number >= 3 else "default")
        try:
            learn(peer, batch, 0, meters, Control(step=number))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert meters.sums()["loss/count"] == number + 1 > 3


def test_an_epoch_runs_and_leaves_finite_weights(small: Make, alone: torch.device, tmp_path: Path) -> None:
    config = small(peers=["resnet8"], distiller="none", epochs=1, image_size=16, precision="auto")
    peer = set_up(config, build_mesh(1, 1, alone, [0]), alone, load_splits(config.dataset))
    train_epoch(peer, Progress(), FolderSession(tmp_path))
    assert (tmp_path / "checkpoint-epoch0001" / "peer0.pt").exists()
    assert all(torch.isfinite(value).all() for value in peer.network.state_dict().values())
