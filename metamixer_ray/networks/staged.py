"""A network whose features can be read and changed between its stages, without touching its code."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from metamixer_ray.errors import ConfigError

Tap = Callable[[Tensor], Tensor]
"""A function of what flows between two stages; what it returns flows on."""

Layout = Literal["BCHW", "BHWC", "BNC", "BC"]
"""What the axes of a stage's output mean: batch, channels, height, width, token number."""


class _Taps:
    """The taps of the forward pass that is under way, shared by all hooks of one network."""

    def __init__(self) -> None:
        self.current: Mapping[int, Tap] | None = None
        self.apply = _apply


def _apply(taps: Mapping[int, Tap], stage: int, features: Tensor, copied: bool) -> Tensor:
    if stage not in taps:
        return features
    tapped = taps[stage](features)
    return tapped.clone() if copied else tapped


class _TapHook:
    """The forward hook of one stage: a class and not a closure, so that it can be pickled."""

    def __init__(self, taps: _Taps, stage: int, copied: bool) -> None:
        self.taps = taps
        self.stage = stage
        self.copied = copied

    def __call__(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor | None:
        taps = self.taps.current
        return None if taps is None else self.taps.apply(taps, self.stage, output, self.copied)


class StagedNetwork(nn.Module):
    """A network ``[B, 3, H, W] -> [B, C]`` and its K stages, each a sub-module whose output ends it.

    Args:
        network: the plain network; it becomes :attr:`network`, with one forward hook on each stage.
        stage_names: dotted names of sub-modules of ``network``, in the order in which they run, each called once in a
            forward pass.
        layouts: what the axes of the stages' outputs mean, where the number of axes doesn't tell (``None``: 4 axes are
            ``BCHW``); see :attr:`layouts`.
        overwritten: numbers of stages whose output a later layer overwrites in place. Their taps' results are copied
            before they flow on, so that a tap may keep what it saw for a loss.

    Raises:
        ConfigError: a stage name that is not a sub-module, or a name given twice.
    """

    network: nn.Module
    stage_names: tuple[str, ...]
    layouts: tuple[Layout, ...]
    """The layout of each stage's output: maps are ``BCHW`` (``BHWC`` in Swin), token sequences ``BNC``."""

    def __init__(
        self,
        network: nn.Module,
        stage_names: Sequence[str],
        *,
        layouts: Sequence[Layout] | None = None,
        overwritten: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.network = network
        self.stage_names = tuple(stage_names)
        maps: list[Layout] = ["BCHW" for _ in self.stage_names]
        self.layouts = tuple(maps if layouts is None else layouts)
        if len(self.layouts) != len(self.stage_names):
            raise ValueError(f"{len(self.layouts)} layouts for {len(self.stage_names)} stages")
        self._taps = _Taps()
        self._handles: list[RemovableHandle] = []
        for stage, module in enumerate(stage_modules(network, self.stage_names), start=1):
            hook = _TapHook(self._taps, stage, stage in overwritten)
            self._handles.append(module.register_forward_hook(hook))

    def forward(self, images: Tensor, taps: Mapping[int, Tap] | None = None) -> Tensor:
        """Logits ``[B, C]`` of ``images`` (``[B, 3, H, W]``, floating point).

        ``taps[0]`` is applied to the images, ``taps[k]`` to what flows out of stage k (1 to K): its result
        is what stage k + 1 receives. The taps hold for this call only, also if it fails, and a tap may
        itself call the network.

        Raises:
            ValueError: a tap for a stage that is not there.
        """
        if taps is not None and not all(0 <= stage <= len(self.stage_names) for stage in taps):
            raise ValueError(f"taps {sorted(taps)} for a network whose stages are 0 to {len(self.stage_names)}")
        outer = self._taps.current
        self._taps.current = taps or None
        try:
            if taps:
                images = self._taps.apply(taps, 0, images, False)
            return self.network(images)
        finally:
            self._taps.current = outer

    def compiled(self, **options: Any) -> nn.Module:
        """This network through ``torch.compile``, which takes the ``options``; the taps stay outside of its graphs.

        Taps are new functions at every step, and each would compile the network anew.
        """
        # Not as a decorator: it would bring the compiler, a second's import, into every process that never compiles.
        self._taps.apply = torch.compiler.disable(_apply)
        compiled: nn.Module = torch.compile(self, **options)  # type: ignore[assignment]
        return compiled

    def plain(self) -> nn.Module:
        """A copy of :attr:`network` without hooks, on the same device: to save, to export, to give away."""
        twin = copy.deepcopy(self)
        for handle in twin._handles:
            handle.remove()
        return twin.network


def stage_modules(network: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The sub-modules of those dotted names; ConfigError for one that is missing or named twice."""
    found = dict(network.named_modules(remove_duplicate=False))
    for position, name in enumerate(names):
        if name == "" or name not in found:
            children = ", ".join(child for child, _ in network.named_children())
            raise ConfigError(
                f"--stage-names: {name!r} is no sub-module of {type(network).__name__}; its direct ones are "
                f"{children or '(none)'}. Write NETWORK/SUBMODULE for a name that only one of the peers has."
            )
        if name in names[:position]:
            raise ConfigError(f"--stage-names: {name!r} is given twice; name each stage once.")
    return [found[name] for name in names]


def common_stages(counts: Sequence[int]) -> list[list[int]]:
    """Which stages of peers with ``counts`` stages are compared with each other.

    Returns:
        For each peer, ``min(counts)`` increasing stage numbers (from 1), evenly spread and ending at its
        last stage:
        ``common_stages([3, 5])`` is ``[[1, 2, 3], [2, 3, 5]]``.

    Raises:
        ValueError: no peers, or a peer without stages.
    """
    if not counts or min(counts) < 1:
        raise ValueError(f"every peer needs at least one stage, got {list(counts)}")
    shared = min(counts)
    return [[(2 * j * count + shared) // (2 * shared) for j in range(1, shared + 1)] for count in counts]
