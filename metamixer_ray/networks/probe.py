"""One dry run of a network: which of its stages run, in which order, and what comes out.

Leaves no trace: evaluation mode, copies of the buffers (no BatchNorm statistics move), random state put back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metamixer_ray.networks.staged import StagedNetwork, stage_modules

ROWS = 2
"""Rows of the dry batch: two, so that an output without a batch axis is noticed."""


@dataclass(frozen=True)
class StageTrace:
    """What one stage did in the dry run."""

    name: str
    calls: int
    shape: tuple[int, ...] | None
    """Shape of its output, None when it isn't one tensor."""
    overwritten: bool
    """Whether a later layer changed that output in place."""


class _Recorder:
    def __init__(self) -> None:
        self.calls = 0
        self.output: Any = None
        self.version = 0


def dry_run(network: nn.Module, names: Sequence[str], *, image_size: int) -> tuple[Any, list[StageTrace]]:
    """Run ``network`` on :data:`ROWS` random images ``[2, 3, image_size, image_size]`` and watch the stages
    ``names``.

    Returns:
        The network's output, and the traces in the order in which the stages first finished (those never
        called last). Whatever the network raises is not caught.
    """
    recorders = {name: _Recorder() for name in names}
    finished: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: Any) -> None:
            recorder = recorders[name]
            recorder.calls += 1
            if recorder.calls == 1:
                finished.append(name)
                recorder.output = output
                recorder.version = output._version if isinstance(output, Tensor) else 0

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in zip(names, stage_modules(network, names), strict=True)
    ]
    modes = [(module, module.training) for module in network.modules()]
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    cuda = [device] if device.type == "cuda" else []
    images = torch.rand(ROWS, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        network.eval()
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            output = torch.func.functional_call(network, buffers, (images.to(device),))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training

    traces = []
    for name in [*finished, *(name for name in names if name not in finished)]:
        recorder = recorders[name]
        features = recorder.output if isinstance(recorder.output, Tensor) else None
        traces.append(
            StageTrace(
                name=name,
                calls=recorder.calls,
                shape=None if features is None else tuple(features.shape),
                overwritten=features is not None and features._version != recorder.version,
            )
        )
    return output, traces


def embedding_width(network: StagedNetwork, *, image_size: int) -> int:
    """Channels of what flows out of the last stage."""
    _, (trace,) = dry_run(network.network, network.stage_names[-1:], image_size=image_size)
    assert trace.shape is not None, "build_network checks that a stage gives one tensor"
    return trace.shape[1 if network.layouts[-1] == "BCHW" else -1]
