"""Optimizers and learning-rate schedules, one for all peers or one for each.

The learning rate is a pure function of the fractional epoch, so a resumed run needs no scheduler state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from metamixer_ray.errors import ConfigError

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "milestones", "constant"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class OptimisationConfig:
    """How each peer steps. Where a tuple is asked for, one value serves all peers, or give one for each."""

    optimizer: tuple[Optimizer, ...] = ("sgd",)
    """sgd (with Nesterov momentum) or adamw; one for all peers or one each."""
    lr: tuple[float, ...] = (0.1,)
    """Peak learning rate; one for all peers or one each."""
    weight_decay: tuple[float, ...] = (5e-4,)
    """Weight decay (L2 for sgd, decoupled for adamw); one for all peers or one each."""
    schedule: tuple[Schedule, ...] = ("cosine",)
    """cosine (to zero), milestones (times --lr-decay at each), or constant; one for all peers or one each."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Where the milestones schedule decays, as shares of all epochs: 0.5 0.75 is 150 and 225 of 300."""
    lr_decay: float = 0.1
    """Factor at each milestone."""
    lr_warmup_epochs: float = 0.0
    """The learning rate rises linearly from zero over this many epochs (fractions allowed)."""
    momentum: float = 0.9
    """Momentum of sgd; the first beta of adamw."""
    nesterov: bool = True
    """Nesterov momentum for sgd."""

    def check(self, peers: int) -> None:
        """Raise ConfigError where a value can't work for ``peers`` peers."""
        for name in ("optimizer", "lr", "weight_decay", "schedule"):
            values = getattr(self, name)
            if len(values) not in (1, peers):
                raise ConfigError(
                    f"--{name.replace('_', '-')} has {len(values)} values for {peers} peers: "
                    f"give one for all or {peers}"
                )
        for value in self.lr:
            if not 0 < value < math.inf:
                raise ConfigError(f"--lr must be a positive number, not {value}")
        for name in ("weight_decay", "lr_decay", "lr_warmup_epochs"):
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if not 0 <= value < math.inf:
                    raise ConfigError(f"--{name.replace('_', '-')} must be 0 or a positive number, not {value}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"--momentum must lie in [0, 1), it is {self.momentum}")
        if self.nesterov and self.momentum == 0 and "sgd" in self.optimizer:
            raise ConfigError("--nesterov needs momentum: give --momentum 0.9 or --no-nesterov")
        if any(not 0 < m < 1 for m in self.milestones) or list(self.milestones) != sorted(self.milestones):
            raise ConfigError(
                f"--milestones are rising shares of all epochs between 0 and 1, not {self.milestones}; "
                "write 0.5 0.75 for epochs 150 and 225 of 300"
            )


def for_peer(values: Sequence[T], peer: int) -> T:
    """The value of one peer, where one value may stand for all."""
    return values[0] if len(values) == 1 else values[peer]


def build_optimizer(config: OptimisationConfig, peer: int, *modules: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of peer number ``peer``, with a parameter group for each module that has any; fused where the
    device has it."""
    lr, weight_decay = for_peer(config.lr, peer), for_peer(config.weight_decay, peer)
    groups = ([p for p in module.parameters() if p.requires_grad] for module in modules)
    parameters = [{"params": group} for group in groups if group]
    if for_peer(config.optimizer, peer) == "sgd":
        sgd = torch.optim.SGD(
            parameters,
            lr=lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=weight_decay,
            fused=True,
        )
        if config.momentum:
            # A first step that is left out would leave torch (2.14) with momenta of whatever was in memory.
            for parameter in (p for group in sgd.param_groups for p in group["params"]):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return torch.optim.AdamW(parameters, lr=lr, betas=(config.momentum, 0.999), weight_decay=weight_decay, fused=True)


def average_gradients(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Give all ranks of ``group`` the mean of their gradients of ``module``, one that DistributedDataParallel has not.

    One all-reduce of them all, always in the same order, so that a resumed run sums as an uninterrupted one.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if group is None or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def learning_rate(config: OptimisationConfig, peer: int, progress: float, epochs: int) -> float:
    """Learning rate of a peer after ``progress`` epochs (fractions count) of ``epochs``."""
    peak, schedule = for_peer(config.lr, peer), for_peer(config.schedule, peer)
    if progress < config.lr_warmup_epochs:
        return peak * progress / config.lr_warmup_epochs
    if schedule == "cosine":
        length = max(epochs - config.lr_warmup_epochs, 1e-9)
        done = min((progress - config.lr_warmup_epochs) / length, 1.0)
        return peak * 0.5 * (1.0 + math.cos(math.pi * done))
    if schedule == "milestones":
        # A milestone is an epoch boundary, as in the papers; a share in between is rounded to the nearest.
        return peak * config.lr_decay ** sum(progress >= max(1, round(m * epochs)) for m in config.milestones)
    return peak
