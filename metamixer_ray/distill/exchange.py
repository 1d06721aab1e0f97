"""The exchange: per step one collective that carries everything peers tell each other.

With reduce 'mean' it is one ``all_reduce(SUM)`` of a flat buffer; a peer subtracts its own part and divides
by P - 1, so the bytes it sends do not grow with the number of peers P. With reduce 'each' it is one
``all_gather``, for losses that need every peer's own tensors. In both, control takes the buffer's last few
floats. With reduce 'lowest' what a distiller says is in an ``all_reduce(MIN)`` of its own, under way at the same time;
its bytes don't grow with P either.
"""

import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from metamixer_ray.distill.control import (
    CONTROL_FLOATS,
    KNOWN_FLOATS,
    Control,
    ControlSum,
    PeersDisagree,
    PeersDrifted,
    decode_control,
    encode_control,
)
from metamixer_ray.distill.heard import Heard, Reduce

# torch 2.14 renamed this collective; older releases know only the second name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

EXCHANGE_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
"""What ``--exchange-dtype`` names."""

_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class ExchangeCost:
    """What the exchange cost since the last reset, seen from the host.

    On a GPU with NCCL the host only queues the collective, so its time on the device is not in here.
    """

    steps: int
    """Completed exchanges."""
    sent_bytes: float
    """Bytes a worker handed to the collectives: the buffers for 'mean' and 'lowest', whatever P; the buffer
    times P - 1 for 'each'. 0 with one peer. What was spread counts as for 'each'."""
    seconds: float
    """Time inside ``start``, ``wait`` and ``spread``. What lies between the first two is free and not counted."""
    wait_seconds: float
    """Of these, time blocked for the collective to end."""

    @property
    def bytes_per_step(self) -> float:
        """``sent_bytes`` per completed exchange."""
        return self.sent_bytes / max(1, self.steps)

    @property
    def seconds_per_step(self) -> float:
        """``seconds`` per completed exchange."""
        return self.seconds / max(1, self.steps)


class Exchange:
    """One peer's end of the exchange over the peer axis.

    Args:
        group: the process group of this replica's peers, or None when there is one peer only.
        device: where what is said comes from and what is heard is put.
        dtype: what travels. In bfloat16 half the bytes do, and sums are rounded to 8 bits.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> None:
        self.group = group
        self.device = torch.device(device)
        self.dtype = dtype
        self.peers = dist.get_world_size(group) if group is not None else 1
        self.own_index = dist.get_rank(group) if group is not None else 0
        self._flag_weights = torch.tensor([1.0, self.own_index + 1.0], device=self.device, dtype=dtype)
        self._agreed: set[tuple[_Shapes, _Shapes, Reduce]] = set()
        self.reset_cost()

    @torch.no_grad()
    def start(
        self,
        said: Mapping[str, Tensor],
        *,
        control: Control,
        reduce: Reduce = "mean",
        beside: Mapping[str, Tensor] | None = None,
        also_finite: Tensor | None = None,
    ) -> "Pending":
        """Send what this peer says and return at once; ``wait`` on the result gives what it hears.

        Args:
            said: per name a tensor of any shape; all peers must give the same names and shapes. Sent as
                the exchange's dtype.
            control: this peer's step, flags and wishes.
            reduce: 'mean', 'each' or 'lowest', see ``Heard``.
            beside: more of the kind, of which the means are heard whatever ``reduce`` is.
            also_finite: a tensor that isn't sent but must be finite too, such as this peer's own loss.

        If anything in ``said``, ``beside`` or ``also_finite`` is not finite, zeros are sent in place of *everything*
        said, with this peer's flag. That is decided on the device: a GPU is not made to wait.

        The first time a set of shapes is used, a tiny collective of its own (not counted as cost) makes sure
        that all peers mean the same ones, because a collective of unequal sizes kills or hangs its processes.

        Raises:
            PeersDrifted: on that first time, the peers are at different steps.
            PeersDisagree: on that first time, the peers want to exchange different names, shapes or
                reductions.
        """
        apart = said if reduce == "lowest" else {}
        packed = {**({} if apart else said), **(beside or {})}
        shapes, apart_shapes = _shapes(packed), _shapes(apart)
        if self.group is not None and self.peers > 1 and (shapes, apart_shapes, reduce) not in self._agreed:
            self._agree(shapes, apart_shapes, reduce, control.step)
        started = time.perf_counter()
        own, lowest = self._pack(packed, shapes, CONTROL_FLOATS), self._pack(apart, apart_shapes)
        self._seal(own, lowest, control, also_finite)
        total = own
        works: list[dist.Work | None] = []
        if self.peers > 1 and reduce == "each":
            total = own.new_empty(self.peers * own.numel())
            works.append(_all_gather(total, own, group=self.group, async_op=True))
        elif self.peers > 1:
            total = own.clone()
            works.append(dist.all_reduce(total, group=self.group, async_op=True))
        if self.peers > 1 and apart:
            works.append(dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=self.group, async_op=True))
        sent = _Sent(shapes, own, total, apart_shapes, lowest, works)
        return Pending(self, sent, reduce, control.step, time.perf_counter() - started)

    @torch.no_grad()
    def spread(self, own: Tensor, sizes: Sequence[int], *, step: int) -> list[Tensor]:
        """Every peer's ``own`` in the order of their indices, by a broadcast each: for what is large and seldom said.

        Args:
            own: float32 [n], on the exchange's device; sent as it is, whatever the exchange's dtype.
            sizes: n of every peer, in the same order.
            step: this peer's.

        Raises:
            PeersDrifted, PeersDisagree: the first time, as in :meth:`start`.
        """
        shapes: _Shapes = (("spread", tuple(sizes)),)
        if (shapes, (), "each") not in self._agreed:
            self._agree(shapes, (), "each", step)
        started = time.perf_counter()
        told = [own if peer == self.own_index else own.new_empty(size) for peer, size in enumerate(sizes)]
        works = [
            dist.broadcast(values, group=self.group, group_src=peer, async_op=True) for peer, values in enumerate(told)
        ]
        for work in works:
            if work is not None:
                work.wait()
        seconds = time.perf_counter() - started
        self._bytes += own.nbytes * (self.peers - 1)
        self._seconds += seconds
        self._wait_seconds += seconds
        return told

    def cost(self) -> ExchangeCost:
        """What the exchanges that ended since the last reset cost."""
        return ExchangeCost(
            steps=self._steps, sent_bytes=self._bytes, seconds=self._seconds, wait_seconds=self._wait_seconds
        )

    def reset_cost(self) -> None:
        """Begin counting anew."""
        self._steps = 0
        self._bytes = 0
        self._seconds = 0.0
        self._wait_seconds = 0.0

    def _count(self, sent_bytes: int, seconds: float, wait_seconds: float) -> None:
        self._steps += 1
        self._bytes += sent_bytes
        self._seconds += seconds
        self._wait_seconds += wait_seconds

    def _pack(self, said: Mapping[str, Tensor], shapes: _Shapes, room: int = 0) -> Tensor:
        """One flat buffer: what is said in the order of ``shapes``, and ``room`` for so many more numbers."""
        payload_size = sum(math.prod(shape) for _, shape in shapes)
        flat = torch.empty(payload_size + room, device=self.device, dtype=self.dtype)
        if shapes:
            torch.cat([said[name].detach().to(flat).reshape(-1) for name, _ in shapes], out=flat[:payload_size])
        return flat

    def _seal(self, flat: Tensor, lowest: Tensor, control: Control, also_finite: Tensor | None) -> None:
        """Write control to the end of ``flat``, and zeros in place of what is said if any of it isn't finite."""
        payload, tail = flat[:-CONTROL_FLOATS], flat[-CONTROL_FLOATS:]
        # One sum is a quarter of the cost of looking at each value, and what overflows it could not be summed
        # over peers either.
        finite = torch.isfinite(payload.sum() + lowest.sum())
        if also_finite is not None:
            finite = finite & torch.isfinite(also_finite.detach()).all().to(self.device)
        if control.nonfinite:
            finite = torch.zeros_like(finite)
        payload.masked_fill_(~finite, 0.0)
        lowest.masked_fill_(~finite, 0.0)
        # Pinned, or else the copy to a GPU would wait for what is queued there.
        known = torch.tensor(encode_control(control), dtype=self.dtype, pin_memory=self.device.type == "cuda")
        tail[:KNOWN_FLOATS].copy_(known, non_blocking=True)
        torch.mul(self._flag_weights, ~finite, out=tail[KNOWN_FLOATS:])

    def _agree(self, shapes: _Shapes, apart: _Shapes, reduce: Reduce, step: int) -> None:
        print_of_shapes = zlib.crc32(repr((shapes, apart, reduce, self.dtype)).encode())
        # A maximum of x and of -x gives both ends of the range in one collective.
        ends = torch.tensor([step, -step, print_of_shapes, -print_of_shapes], device=self.device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self.group)
        last, first, high, low = ends.tolist()
        first, low = -first, -low
        if first != last:
            raise PeersDrifted(
                f"peers are at different steps: from step {first} to step {last}, this one at step {step}. "
                "Resume all of them from the same checkpoint."
            )
        if low != high:
            wanted = ", ".join(f"{name} {list(shape)}" for name, shape in (*shapes, *apart)) or "nothing"
            raise PeersDisagree(
                f"peers want to exchange different things; peer {self.own_index} wants reduce '{reduce}' of: "
                f"{wanted}. All peers need the same options, classes, rows per batch and number of stages."
            )
        self._agreed.add((shapes, apart, reduce))


@dataclass(frozen=True)
class _Sent:
    """The buffers of an exchange under way."""

    shapes: _Shapes
    own: Tensor
    """What this peer says, then its control."""
    total: Tensor
    """Becomes the sum of all peers' ``own``, or with reduce 'each' all of them."""
    apart: _Shapes
    lowest: Tensor
    """What is said with reduce 'lowest'; becomes the lowest of all peers'."""
    works: list[dist.Work | None]


class Pending:
    """An exchange under way, made by ``Exchange.start``."""

    def __init__(self, exchange: Exchange, sent: _Sent, reduce: Reduce, step: int, start_seconds: float) -> None:
        self._exchange, self._sent = exchange, sent
        self._reduce, self._step, self._start_seconds = reduce, step, start_seconds
        self._heard: Heard | None = None

    def wait(self) -> Heard:
        """Wait for the others, then what they said; the same object when asked again.

        Raises:
            PeersDrifted: the peers are at different steps (on a GPU: when ``Heard.control`` is first read, so
                that this needn't wait for the device).
            RuntimeError: from torch.distributed, when a peer has died or the group's timeout has passed.
        """
        if self._heard is None:
            self._heard = self._finish()
        return self._heard

    @torch.no_grad()
    def _finish(self) -> Heard:
        exchange, sent, peers = self._exchange, self._sent, self._exchange.peers
        called = time.perf_counter()
        for work in sent.works:
            if work is not None:
                work.wait()
        waited = time.perf_counter() - called
        size = sent.own.numel() - CONTROL_FLOATS
        others: dict[str, Tensor] = {}
        each: dict[str, Tensor] = {}
        lowest: dict[str, Tensor] = {}
        control = sent.total[size:]
        senders = 0
        if peers > 1 and self._reduce == "each":
            rows = sent.total.view(peers, -1).float()
            mean = rows[:, :size].sum(0).sub_(sent.own[:size]).div_(peers - 1)
            others = _unpack(mean, sent.shapes)
            each = _unpack(rows[:, :size], sent.shapes)
            control = rows[:, size:].sum(0)
            senders = peers - 1
        elif peers > 1:
            mean = sent.total[:size].float().sub_(sent.own[:size]).div_(peers - 1)
            others = _unpack(mean, sent.shapes)
            lowest = _unpack(sent.lowest.float(), sent.apart)
            senders = 1
        heard = Heard(
            peers=peers,
            own_index=exchange.own_index,
            others=others,
            each=each,
            lowest=lowest,
            read_control=_reader(control, peers, self._step),
        )
        exchange._count(
            sent_bytes=(sent.own.nbytes + sent.lowest.nbytes) * senders,
            seconds=self._start_seconds + time.perf_counter() - called,
            wait_seconds=waited,
        )
        if control.device.type == "cpu":
            _ = heard.control  # costs nothing here, and a drift is told at once
        return heard


def _shapes(said: Mapping[str, Tensor]) -> _Shapes:
    return tuple((name, tuple(said[name].shape)) for name in sorted(said))


def _unpack(flat: Tensor, shapes: _Shapes) -> dict[str, Tensor]:
    """Views by name of a buffer [..., n]; leading axes are kept."""
    pieces = flat.split([math.prod(shape) for _, shape in shapes], dim=-1) if shapes else ()
    lead = flat.shape[:-1]
    return {name: piece.view((*lead, *shape)) for (name, shape), piece in zip(shapes, pieces, strict=True)}


def _reader(control: Tensor, peers: int, step: int) -> Callable[[], ControlSum]:
    """How to read the control floats later, waiting on a GPU for nothing that was queued after them."""
    if control.device.type != "cuda":
        return partial(_read_control, control, None, peers, step)
    copied = torch.empty(control.shape, dtype=control.dtype, pin_memory=True)
    copied.copy_(control, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(control.device))
    return partial(_read_control, copied, arrived, peers, step)


def _read_control(values: Tensor, arrived: torch.cuda.Event | None, peers: int, step: int) -> ControlSum:
    if arrived is not None:
        arrived.synchronize()
    return decode_control(values.tolist(), peers, step)
