"""An optimizer's step with gradients that are finite, or none; in float16, of a loss that is scaled for them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from metamixer_ray.precision import Arithmetic


def running_statistics(network: nn.Module) -> list[Tensor]:
    """The running means and variances of a network's normalisation layers, one-dimensional."""
    layers = (module for module in network.modules() if isinstance(module, _NormBase))
    return [each for layer in layers for each in (layer.running_mean, layer.running_var) if each is not None]


def overflow(running: Sequence[Tensor]) -> Tensor:
    """0, or NaN where a running mean or variance isn't finite.

    A variance overflows where logits, loss and gradients are still fine, and would stay so for good.
    """
    if not running:
        return torch.zeros(())
    return torch.where(torch.cat([*running]).isfinite().all(), 0.0, torch.nan)


class Stepper:
    """Takes the steps of one peer.

    A step whose gradients aren't finite is left out, on the device: nobody waits to know it. In float16 that is how the
    scale of the loss is found, and happens now and then; in other arithmetic the peer is broken.

    Args:
        optimizer: a fused one, which leaves a step out when it is told to.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, precision: Arithmetic, device: torch.device) -> None:
        self._optimizer = optimizer
        self._scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
        self.broken = torch.zeros((), device=device)
        """NaN when the last gradients weren't finite and nothing was learnt from them, else 0. To be told to the others
        with the next step, which all then skip."""

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a loss."""
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def step(self) -> None:
        """Learn from the gradients, if they are finite."""
        if self._scaler is None:
            self.broken = self._unsound()
            self._optimizer.found_inf = self.broken.isnan().float()  # type: ignore[attr-defined]
            self._optimizer.step()
            return
        self._scaler.step(self._optimizer)
        self._scaler.update()
        # Gradients that overflow without any scale are not float16's fault.
        scale = self._scaler.scale(torch.ones_like(self.broken))
        self.broken = torch.where(scale < 1, torch.nan, 0.0)

    def skip(self) -> None:
        """Leave a step out that somebody is broken in; this peer stays so while its gradients aren't finite, and in
        float16 for good."""
        if self._scaler is None:
            self.broken = torch.where(self.broken.isnan(), self._unsound(), self.broken)

    def _unsound(self) -> Tensor:
        """0, or NaN where the gradients aren't finite."""
        parameters = (p for group in self._optimizer.param_groups for p in group["params"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients, foreach=True) * 0.0

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on as if nothing had happened."""
        return {"broken": self.broken, **(self._scaler.state_dict() if self._scaler else {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.broken = state["broken"].to(self.broken)
        if self._scaler is not None:
            self._scaler.load_state_dict({k: v for k, v in state.items() if k != "broken"})
