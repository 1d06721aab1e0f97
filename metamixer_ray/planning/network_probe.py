"""What one network costs a worker: seconds of a step and bytes kept for the backward pass, measured on this machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from metamixer_ray.distill import flat_state
from metamixer_ray.networks import StagedNetwork
from metamixer_ray.precision import Arithmetic, autocast

ROUNDS = 5
FIRST_ROWS = 8
ENOUGH_SECONDS = 0.5
"""A step that takes this long isn't made larger to be timed: time per image changes little from there on."""


@dataclass(frozen=True, kw_only=True)
class NetworkCosts:
    """One network as a worker trains it."""

    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    """Of those that learn."""
    buffer_bytes: int
    """Such as BatchNorm's running statistics."""
    told_bytes: int
    """What other peers' copies of it take, see ``distill.flat_state``."""
    optimizer_bytes: int
    """What the optimizer keeps, such as momentum."""
    saved_bytes: float
    """Kept from forward to backward pass whatever the batch, such as bf16 copies of the weights."""
    saved_bytes_per_row: float
    """Kept from forward to backward pass per image."""
    largest_bytes_per_row: float
    """The largest tensor among them, per image."""
    training_flops_per_row: float
    """Floating-point operations of forward and backward pass per image."""
    timed_rows: int
    """Images of the steps that were timed."""
    step_seconds: float
    """Forward, loss, backward and optimizer of ``timed_rows`` images."""
    backward_seconds: float
    """Of that, the backward pass."""
    evaluation_seconds: float
    """Forward pass of ``timed_rows`` images without training."""


def probe_network(
    network: StagedNetwork,
    optimizer: torch.optim.Optimizer,
    *,
    rows: int,
    classes: int,
    image_size: int,
    device: torch.device,
    precision: Arithmetic,
    compiled: bool = False,
) -> NetworkCosts:
    """Train ``network`` for a few steps on random images and see what that takes.

    The network is changed by that. Time is taken with the threads that torch is set to, at ``rows`` images or as many
    as make a step long enough; memory is counted from two small batches, since what a forward pass keeps is a constant
    and a share per image.

    Args:
        network: already on ``device``.
        rows: images of one worker's step, at least 2.
        compiled: whether the steps that are timed run through ``torch.compile``.
    """

    def images(count: int) -> Tensor:
        drawn = torch.rand(count, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
        return drawn.to(device).contiguous(memory_format=torch.channels_last)

    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    forward: nn.Module = network.compiled() if compiled else network
    network.train()
    flops = training_flops(network, images(2)) / 2
    few, _ = saved_for_backward(network, images(2), precision)
    more, largest = saved_for_backward(network, images(4), precision)
    per_row = max((more - few) / 2, 0.0)

    def step(batch: Tensor) -> tuple[float, float]:
        return _timed_step(forward, optimizer, batch, classes, precision)

    count = min(rows, FIRST_ROWS)
    batch = images(count)
    # The first step of a size also builds kernels and buffers.
    step(batch)
    while step(batch)[0] < ENOUGH_SECONDS and count < rows:
        count = min(rows, 2 * count)
        batch = images(count)
        step(batch)
    # The fastest: what else the machine does is no part of the step.
    step_seconds, backward_seconds = min(step(batch) for _ in range(ROUNDS))
    network.eval()
    evaluation_seconds = min(_timed_evaluation(forward, batch, precision) for _ in range(ROUNDS))
    state = (value for slots in optimizer.state.values() for value in slots.values() if isinstance(value, Tensor))
    return NetworkCosts(
        parameters=sum(p.numel() for p in network.parameters()),
        parameter_bytes=sum(p.nbytes for p in network.parameters()),
        gradient_bytes=sum(p.nbytes for p in network.parameters() if p.requires_grad),
        buffer_bytes=sum(b.nbytes for b in network.buffers()),
        told_bytes=flat_state(network).nbytes,
        optimizer_bytes=sum(value.nbytes for value in state),
        saved_bytes=max(few - 2 * per_row, 0.0),
        saved_bytes_per_row=per_row,
        largest_bytes_per_row=largest / 4,
        training_flops_per_row=flops,
        timed_rows=count,
        step_seconds=step_seconds,
        backward_seconds=backward_seconds,
        evaluation_seconds=evaluation_seconds,
    )


def saved_for_backward(network: nn.Module, images: Tensor, precision: Arithmetic) -> tuple[int, int]:
    """Bytes that a forward pass of ``images`` [B, 3, H, W] keeps for the backward pass, the weights themselves not
    counted; and those of the largest activation among them."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages: dict[int, int] = {}
    activations = [0]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
            # Held, so that no later tensor is given the same address.
            kept.append(tensor)
            if tensor.shape[:1] == images.shape[:1]:
                activations.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(precision, images.device):
        logits = network(images)
        F.cross_entropy(logits.float(), logits.detach().float().softmax(1))
    return sum(storages.values()), max(activations)


def training_flops(network: nn.Module, images: Tensor) -> int:
    """Floating-point operations of forward and backward pass of ``images`` [B, 3, H, W]: those of matrix products,
    convolutions and attention, a multiplication with its addition counted as two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(images)
    # The backward pass does a forward pass's work twice: for the inputs and for the weights. It isn't counted itself,
    # since torch 2.14 counts the weights of grouped convolutions as if there were no groups (MobileNetV2: tenfold).
    return 3 * counter.get_total_flops()


def _timed_step(
    forward: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, classes: int, precision: Arithmetic
) -> tuple[float, float]:
    """Seconds of a whole step and of its backward pass."""
    targets = torch.full((len(images), classes), 1 / classes, device=images.device)
    now = _clock(images.device)
    began = now()
    with autocast(precision, images.device):
        logits = forward(images)
    loss = F.cross_entropy(logits.float(), targets)
    optimizer.zero_grad(set_to_none=True)
    turned = now()
    loss.backward()
    returned = now()
    optimizer.step()
    return now() - began, returned - turned


@torch.inference_mode()
def _timed_evaluation(forward: nn.Module, images: Tensor, precision: Arithmetic) -> float:
    now = _clock(images.device)
    began = now()
    with autocast(precision, images.device):
        forward(images)
    return now() - began


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds of this thread's own work where that is all there is, so that other programs don't count; else of the
    wall clock, once the device has done what was queued."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.thread_time

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now
