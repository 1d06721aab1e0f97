"""What a user would write, or install, instead: one process, peers in turn, float32, a DataLoader of single images."""

import contextlib
import importlib.util
import io
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from metamixer_ray.config import TrainConfig
from metamixer_ray.networks import build_network
from metamixer_ray.precision import native_bf16
from tests.bench.data import Photos
from tests.bench.drawing import drawn
from tests.bench.limit import SETTINGS
from tests.bench.processes import Group, threads_each
from tests.bench.report import Row, compared
from tests.bench.training import CPU, Block, Ours, Timer, configured, slowest

LOADER_PROCESSES = 2
STEPS = 16
RIVAL = "pydml"
"""The module of PyPI's pytorch-dml, which is compared with where it is installed."""


class Textbook:
    """Deep mutual learning as it is usually written down."""

    def __init__(self, config: TrainConfig, *, rows: int, image_size: int) -> None:
        torch.manual_seed(0)
        self.networks = [
            build_network(name, classes=10, image_size=image_size, config=config.networks).plain()
            for name in config.peers
        ]
        self.optimizers = [
            torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
            for network in self.networks
        ]
        self.temperature = config.distillation.temperature
        self.rows = rows
        self.loader = DataLoader(
            Photos(rows, image_size),
            batch_size=config.batch_size,
            shuffle=True,
            num_workers=LOADER_PROCESSES,
            persistent_workers=True,
        )
        for _ in self.loader:  # the loader's processes start here, not in what is measured
            pass

    def block(self) -> Block:
        """One epoch; images are counted once, though both networks see them."""
        timer = Timer()
        self.epoch()
        return timer.stop(steps=len(self.loader), images=self.rows)

    def epoch(self) -> float:
        total = 0.0
        for network in self.networks:
            network.train()
        for images, labels in self.loader:
            logits = [network(images) for network in self.networks]
            for own, optimizer in enumerate(self.optimizers):
                loss = F.cross_entropy(logits[own], labels)
                for other, theirs in enumerate(logits):
                    if other != own:
                        divergence = F.kl_div(
                            F.log_softmax(logits[own] / self.temperature, dim=1),
                            F.softmax(theirs.detach() / self.temperature, dim=1),
                            reduction="batchmean",
                        )
                        loss = loss + self.temperature**2 * divergence / (len(logits) - 1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item()
        return total


class Rival(Textbook):
    """The same networks, optimizers and loader in the hands of pytorch-dml's trainer."""

    def __init__(self, config: TrainConfig, **sizes: int) -> None:
        super().__init__(config, **sizes)
        trainers = importlib.import_module(RIVAL)
        self.trainer = trainers.DMLTrainer(
            self.networks,
            trainers.DMLConfig(temperature=self.temperature),
            device="cpu",
            optimizers=self.optimizers,
        )

    def epoch(self) -> float:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            metrics: dict[str, float] = self.trainer.train_epoch(self.loader, 0)
        return metrics["train_loss"]


def measure(rounds: int, settings: dict[str, Any] = SETTINGS, steps: int = STEPS, image_size: int = 32) -> list[Row]:
    """The section; ``settings`` of the training, of which a block runs ``steps``."""
    peers = len(settings["peers"])
    count = steps * settings["batch_size"]
    data = drawn(train=count, size=image_size)
    precisions = ["float32", *(["bf16"] if native_bf16(CPU) else [])]
    sizes = {"rows": count, "image_size": image_size}
    config = configured(data=data, **settings)
    rivals = {"the textbook's loop": Textbook}
    if importlib.util.find_spec(RIVAL) is not None:
        rivals["pytorch-dml"] = Rival

    speeds: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        groups: dict[str, Group] = {
            precision: stack.enter_context(
                Group(
                    peers,
                    Ours,
                    configured(data=data, precision=precision, **settings),
                    threads=threads_each(peers),
                )
            )
            for precision in precisions
        }
        for name, kind in rivals.items():
            groups[name] = stack.enter_context(Group(1, kind, config, threads=None, **sizes))
        for counted in range(-1, rounds):
            for name, group in groups.items():
                speed = slowest(group.call("block")).speed
                if counted >= 0:
                    speeds.setdefault(name, []).append(speed)
    return [
        compared(
            "textbook",
            f"{peers} x {settings['peers'][0]}, batch {settings['batch_size']}, {precision}, everything on",
            speeds[precision],
            f"{name} (float32, {LOADER_PROCESSES} loader processes)",
            speeds[name],
            "images/s",
            wanted=">= 2.2" if precision == "bf16" else ">= 1.3",
        )
        for name in rivals
        for precision in precisions
    ]
