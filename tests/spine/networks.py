"""Small networks of one's own, as ``--peers tests.spine.networks:tiny`` names them."""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor, nn

SEEN: list[str] = []
"""Hashes of the images of every training step of this process's own network."""


def digest(values: Tensor) -> str:
    """A hash of a tensor's values, whatever its memory format."""
    return hashlib.sha256(values.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


class Tiny(nn.Module):
    """Two stages and a head. ``spoil``, ``spoil_gradient``: steps (from 0) whose logits or gradients are NaN."""

    stage_names = ("one", "two")

    def __init__(
        self,
        classes: int,
        *,
        width: int = 8,
        norm: bool = False,
        dropout: float = 0.0,
        spoil: range = range(0),
        spoil_rank: int | None = None,
        spoil_evaluation: bool = False,
        spoil_gradient: range = range(0),
    ) -> None:
        super().__init__()
        self.one = self._stage(3, width, norm)
        self.two = self._stage(width, 2 * width, norm)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width, classes)
        self.spoil, self.spoil_rank, self.spoil_evaluation = spoil, spoil_rank, spoil_evaluation
        self.spoil_gradient = spoil_gradient
        self.steps = 0

    @staticmethod
    def _stage(inputs: int, outputs: int, norm: bool) -> nn.Sequential:
        layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)]
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        return nn.Sequential(*layers, nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        spoiled = self.spoil_evaluation
        if self.training:
            SEEN.append(digest(images))
            spoiled = self.steps in self.spoil and self.spoil_rank in (None, dist.get_rank())
            self.steps += 1
        logits = self.head(self.drop(self.two(self.one(images)).mean((2, 3))))
        if self.training and self.steps - 1 in self.spoil_gradient:
            logits.register_hook(lambda gradient: gradient * torch.nan)
        return logits * torch.nan if spoiled else logits


class Quiet(Tiny):
    """The same without a record of the images, which a compiler can take whole."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.two(self.one(images)).mean((2, 3)))
        return logits


def quiet(classes: int) -> nn.Module:
    return Quiet(classes)


def tiny(classes: int) -> nn.Module:
    return Tiny(classes)


def wide(classes: int) -> nn.Module:
    return Tiny(classes, width=12)


def dropping(classes: int) -> nn.Module:
    return Tiny(classes, norm=True, dropout=0.3)


def broken_once(classes: int) -> nn.Module:
    return Tiny(classes, spoil=range(2, 3))


def broken_for_ever(classes: int) -> nn.Module:
    return Tiny(classes, spoil=range(1, 10**9), spoil_evaluation=True)


def broken_on_the_last_rank(classes: int) -> nn.Module:
    return Tiny(classes, spoil=range(1, 10**9), spoil_rank=3)


def overflowing_once(classes: int) -> nn.Module:
    return Tiny(classes, spoil_gradient=range(2, 3))


def overflowing_for_ever(classes: int) -> nn.Module:
    return Tiny(classes, spoil_gradient=range(3, 10**6))
