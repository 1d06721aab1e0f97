"""OKDDip (Chen, Mei, Wang, Feng, Chen: "Online Knowledge Distillation with Diverse Peers", AAAI 2020, 1912.00350) in
its network-based form: every peer is a whole network.

The last peer is the group leader, the one to deploy; the A = P - 1 others are auxiliary. With q_b the probabilities of
peer b at temperature T and h_b its embedding of an image, the loss of peer a is T squared times

    auxiliary:  KL(t_a || q_a),  t_a = sum_b alpha_ab q_b  over the auxiliaries b, a itself among them,
                alpha_ab = softmax_b(L(h_a) . E(h_b))  with learnt linear maps L (query) and E (key)
    leader:     KL(t || q),  t = sum_b q_b / A.

Exchanged: every peer's logits and key, and whether it leads: 4 (B (C + D) + 1) bytes to each other peer, D being
``--projection-dim``.

The paper mixes probabilities, and so does this; its public code (``DefangChen/OKDDip``) mixes logits, and adds 1e-7 to
the target. There L and E are shared by all peers and nothing is detached, so that a peer is also changed by the targets
of the others. Here each auxiliary has maps of its own and learns them, and its embedding, through the attention of its
own target only (the key: as far as it attends to itself); predictions in a target carry no gradient, nor does anything
that was heard. The code's D is an eighth of the channels; here it is one number for peers of any width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamixer_ray.distill.heard import Heard, Reduce
from metamixer_ray.distill.own import Own

LOGITS, KEYS, LEADS = "okddip/logits", "okddip/keys", "okddip/leads"
"""[B, C] logits; [B, D] keys, zeros of the leader; [1] one of the leader, else zero: peers are heard in the order of
their ranks, so the last one heard need not be the last peer."""


class Auxiliary(nn.Module):
    """Imitates the auxiliary peers it attends to; ``width`` is that of the embedding, ``dim`` that of keys."""

    reduce: Reduce = "each"

    def __init__(self, temperature: float, *, width: int, dim: int) -> None:
        super().__init__()
        self.temperature = temperature
        self.query = nn.Linear(width, dim, bias=False)
        self.key = nn.Linear(width, dim, bias=False)

    def say(self, own: Own) -> dict[str, Tensor]:
        """Its logits and keys."""
        with torch.autocast(own.logits.device.type, enabled=False):
            return _message(own.logits, self.key(own.embedding), leads=False)

    def loss(self, own: Own, heard: Heard) -> Tensor:
        """T squared times the mean over the batch of KL(t_a || q_a), in nats; its gradient goes to ``own`` and to the
        query and key."""
        if heard.peers == 1:
            return torch.zeros((), device=own.logits.device)
        with torch.autocast(own.logits.device.type, enabled=False):
            mine = torch.arange(heard.peers, device=own.embedding.device) == heard.own_index
            keys = torch.where(mine[:, None, None], self.key(own.embedding), heard.each[KEYS])
            energies = torch.einsum("bd,pbd->pb", self.query(own.embedding), keys)
            return _divergence_from_mixture(own.logits, energies, heard, self.temperature)


class GroupLeader:
    """Imitates the mean prediction of the auxiliary peers; has nothing to learn but its network."""

    reduce: Reduce = "each"

    def __init__(self, temperature: float, *, dim: int) -> None:
        self.temperature, self.dim = temperature, dim

    def say(self, own: Own) -> dict[str, Tensor]:
        """That it leads; its logits and keys, which nobody reads."""
        return _message(own.logits, own.logits.new_zeros(len(own.logits), self.dim), leads=True)

    def loss(self, own: Own, heard: Heard) -> Tensor:
        """T squared times the mean over the batch of KL(t || q), in nats."""
        if heard.peers == 1:
            return torch.zeros((), device=own.logits.device)
        with torch.autocast(own.logits.device.type, enabled=False):
            alike = torch.zeros_like(heard.each[LEADS])
            return _divergence_from_mixture(own.logits, alike, heard, self.temperature)


def _message(logits: Tensor, keys: Tensor, *, leads: bool) -> dict[str, Tensor]:
    flag = torch.full((1,), float(leads), device=logits.device)
    return {LOGITS: logits.detach().float(), KEYS: keys.detach().float(), LEADS: flag}


def _divergence_from_mixture(logits: Tensor, energies: Tensor, heard: Heard, temperature: float) -> Tensor:
    """T squared times the mean over the batch of KL(t || softmax(logits / T)), with gradient into ``energies`` too.

    t mixes the auxiliaries' predictions by the softmax of ``energies`` [P, B or 1]. All in logarithms: a prediction may
    be zero in float32.
    """
    shares = F.log_softmax(energies.masked_fill(heard.each[LEADS] > 0, -torch.inf), dim=0)
    predictions = F.log_softmax(heard.each[LOGITS] / temperature, dim=2)
    target = torch.logsumexp(shares[:, :, None] + predictions, dim=0)
    log_probabilities = F.log_softmax(logits.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_probabilities, target, log_target=True, reduction="batchmean")
