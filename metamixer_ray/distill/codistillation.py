"""Codistillation (Anil, Pereyra, Passos, Ormandi, Dahl, Hinton: "Large scale distributed neural network training
through online distillation", ICLR 2018, arXiv 1804.03235).

Every peer keeps copies of the other peers' networks, brought up to date every ``--stale-steps`` steps, and imitates the
mean of what the copies predict for its own batch. With p_j the predictions of the copy of peer j at temperature T, the
loss of peer i is T squared times KL(mean_j p_j || p_i), j over the others. The copies look as they would be evaluated
(BatchNorm by its running statistics) and carry no gradient. The burn-in, epochs without any of this at the start, is
``--kd-burn-in-epochs``. There are copies from the first K-th step on at which the others count at all: untrained
networks have nothing to say.

Exchanged: all of a network's weights and running statistics, as float32, to each other peer, but only at every K-th
step; per step control, and feature statistics where they are measured. Instead a peer runs P - 1 forward passes more,
and holds P - 1 more networks.

Ours and not the paper's: the temperature, and a linear ramp after the burn-in. Peers see the same batches unless
``--disjoint-data`` gives each a part of the images of its own, as the paper recommends. There peers exchange
checkpoints through files whenever they like, here all at the same step, so that a run can be repeated.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from metamixer_ray.distill.heard import Heard, Reduce
from metamixer_ray.distill.own import Own
from metamixer_ray.distill.teaching import Teaching


class Codistillation:
    """Has a peer imitate the mean prediction of the others' stale copies, in the way of ``teaching``."""

    reduce: Reduce = "mean"

    def __init__(self, teaching: Teaching, temperature: float) -> None:
        self._teaching, self.temperature = teaching, temperature

    def say(self, own: Own) -> dict[str, Tensor]:
        """Nothing: the others have a copy."""
        return {}

    def loss(self, own: Own, heard: Heard) -> Tensor:
        """The divergence from the copies' mean prediction; zero where no copy was asked, as in the burn-in.

        A copy that gives a value that isn't finite is left out: its peer has gone wrong, and not this one.
        """
        if len(own.stale) == 0:
            return torch.zeros((), device=own.logits.device)
        with torch.autocast(own.logits.device.type, enabled=False):
            # Logits of which the softmax at this temperature is the mean prediction; a constant changes nothing.
            predictions = torch.log_softmax(own.stale.float() / self.temperature, dim=2)
            sound = own.stale.isfinite().flatten(1).all(dim=1)
            together = predictions.masked_fill(~sound[:, None, None], -torch.inf).logsumexp(0)
            # Whoever imitates itself learns nothing.
            teacher = torch.where(sound.any(), self.temperature * together, own.logits.detach().float())
            return self._teaching(own.logits, teacher, own.targets)


class StaleCopies:
    """The other peers' networks as they were when they were last told, and what this peer told then.

    Args:
        networks: every peer's network, at its initial weights; they are copied.
        own: which of them is this peer's.
    """

    def __init__(self, networks: Sequence[nn.Module], own: int, device: torch.device) -> None:
        self._others = {peer: _watching(network, device) for peer, network in enumerate(networks) if peer != own}
        self.sizes = [sum(tensor.numel() for tensor in _state(network)) for network in networks]
        """Per peer, how many numbers its network is."""
        self._own = own
        self.told: Tensor | None = None
        """What the others have of this peer, float32 [n]; None before anybody was told anything."""

    def refresh(self, told: Mapping[int, Tensor]) -> None:
        """Bring the copies up to date: by peer, this one included, its :func:`flat_state`."""
        for peer, values in told.items():
            if peer == self._own:
                self.told = values
                continue
            state = _state(self._others[peer])
            pieces = values.split([tensor.numel() for tensor in state])
            for tensor, piece in zip(state, pieces, strict=True):
                tensor.copy_(piece.view(tensor.shape))

    @torch.no_grad()
    def look(self, images: Tensor, taps: Mapping[int, Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """Logits [P - 1, B, C] of the copies, in the order of their peers, for images [B, 3, H, W]."""
        return torch.stack([network(images, taps) for network in self._others.values()])


def flat_state(network: nn.Module) -> Tensor:
    """All parameters and running statistics as one float32 tensor [n]; whole numbers (counters) are left out."""
    return torch.cat([tensor.detach().float().reshape(-1) for tensor in _state(network)])


def _watching(network: nn.Module, device: torch.device) -> nn.Module:
    """A copy that only looks."""
    twin: nn.Module = copy.deepcopy(network).eval().requires_grad_(False)
    for parameter in twin.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return twin.to(device)


def _state(network: nn.Module) -> list[Tensor]:
    return [t.detach() for t in (*network.parameters(), *network.buffers()) if t.is_floating_point()]
