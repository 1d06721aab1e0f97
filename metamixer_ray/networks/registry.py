"""Networks by name: the small-image families, torchvision's classifiers, the user's own."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from metamixer_ray.errors import ConfigError
from metamixer_ray.networks.config import NetworkConfig
from metamixer_ray.networks.densenet import DENSENETS
from metamixer_ray.networks.mobilenet import MOBILENETS
from metamixer_ray.networks.own_network import build_own, found_stages
from metamixer_ray.networks.probe import ROWS, StageTrace, dry_run
from metamixer_ray.networks.resnet import RESNETS
from metamixer_ray.networks.shufflenet import SHUFFLENETS
from metamixer_ray.networks.staged import Layout, StagedNetwork, stage_modules
from metamixer_ray.networks.torchvision_models import (
    SMALL_IMAGE,
    build_torchvision,
    torchvision_layout,
    torchvision_names,
    torchvision_stages,
)
from metamixer_ray.networks.vgg import VGGS
from metamixer_ray.networks.wide_resnet import WIDE_RESNETS

SMALL_IMAGE_NETWORKS: Mapping[str, Callable[[int], nn.Module]] = {
    **RESNETS,
    **WIDE_RESNETS,
    **VGGS,
    **DENSENETS,
    **MOBILENETS,
    **SHUFFLENETS,
}
"""``name -> (classes -> network)``: one line per family; each network declares its ``stage_names``."""


def network_names() -> tuple[str, ...]:
    """Every name that ``--peers`` takes besides the user's ``module:function``: own families, then
    torchvision's."""
    return (*SMALL_IMAGE_NETWORKS, *torchvision_names())


def build_network(name: str, *, classes: int, image_size: int, config: NetworkConfig) -> StagedNetwork:
    """A new network on the CPU, its weights drawn from torch's global generator.

    Args:
        name: one of :func:`network_names` (``wrn-16-2`` and ``ResNet-20`` are understood, too), or
            ``module:function``, called as ``function(classes=..., image_size=...)``. The stages of a user's
            network are its attribute ``stage_names`` or else its direct children that hold parameters, but
            the last (the classifier). ``config.stage_names`` goes before what any network declares.
        classes: how many logits.
        image_size: height and width of the images in px.
        config: the room's options.

    Raises:
        ConfigError: an unknown name or stage, images too small for the network, a user's function that
            can't be used.
    """
    own = ":" in name
    name = name if own else _canonical(name)
    network, stages, layout = _make(name, classes=classes, image_size=image_size, config=config)
    stages = _wanted_stages(name, config) or stages
    if stages is None and not own:
        children = ", ".join(child for child, _ in network.named_children())
        raise ConfigError(
            f"--peers {name}: its stages aren't known; name the sub-modules that end them with --stage-names "
            f"(its direct ones are {children})."
        )
    candidates = found_stages(network) if stages is None else stages
    stage_modules(network, candidates)
    try:
        output, traces = dry_run(network, candidates, image_size=image_size)
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        remedy = "mend its forward" if own else "choose another network"
        raise ConfigError(
            f"--peers {name}: images of {image_size} x {image_size} px don't go through it "
            f"({type(error).__name__}: {reason}). If they are too small for it, set a larger --image-size; "
            f"else {remedy}."
        ) from error
    _check_output(name, output, classes)
    if stages is None:
        traces = [trace for trace in traces if _usable(trace)]
        candidates = tuple(trace.name for trace in traces)
    _check_stages(name, traces, candidates)
    return StagedNetwork(
        network,
        candidates,
        layouts=[_layout(trace, layout) for trace in traces],
        overwritten=[stage for stage, trace in enumerate(traces, start=1) if trace.overwritten],
    )


def _make(
    name: str, *, classes: int, image_size: int, config: NetworkConfig
) -> tuple[nn.Module, tuple[str, ...] | None, Layout | None]:
    """The network, the stages that it declares or is known for, and their layout where it isn't plain."""
    if ":" in name:
        network = build_own(name, classes=classes, image_size=image_size)
        declared: Any = getattr(network, "stage_names", None)
        if isinstance(network, StagedNetwork):
            network = network.plain()
        return network, (declared,) if isinstance(declared, str) else declared and tuple(declared), None
    if name in SMALL_IMAGE_NETWORKS:
        network = SMALL_IMAGE_NETWORKS[name](classes)
        declared = network.stage_names
        _check_size(name, network, image_size)
        return network, tuple(declared), None
    small = config.small_stem == "yes" or (config.small_stem == "auto" and image_size <= SMALL_IMAGE)
    network = build_torchvision(name, classes=classes, image_size=image_size, small_stem=small)
    return network, torchvision_stages(name, network), torchvision_layout(name)


def _canonical(name: str, *, option: str = "--peers") -> str:
    known = network_names()
    if name in known:
        return name
    plain = re.sub(r"^(wrn|resnet|vgg|densenet)[-_](?=\d)", r"\1", name.strip().lower())
    if plain.startswith("wrn"):
        plain = plain.replace("_", "-")
    if plain in known:
        return plain
    near = difflib.get_close_matches(plain, known, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(
        f"{option}: there is no network {name!r}.{hint} Names are this package's "
        f"({', '.join(SMALL_IMAGE_NETWORKS)}), torchvision's, or your own MODULE:FUNCTION."
    )


def _wanted_stages(name: str, config: NetworkConfig) -> tuple[str, ...] | None:
    """The user's stages for this network: those without a network's name before them, and those with this
    one's."""
    wanted = []
    for entry in config.stage_names or ():
        network, slash, stage = entry.rpartition("/")
        if slash and ":" not in network:
            network = _canonical(network, option=f"--stage-names {entry}")
        if not slash or network == name:
            wanted.append(stage)
    return tuple(wanted) or None


def _check_size(name: str, network: nn.Module, image_size: int) -> None:
    minimum = getattr(network, "minimum_image_size", 1)
    if image_size < minimum:
        raise ConfigError(
            f"--peers {name}: it needs images of at least {minimum} px and they have {image_size}; "
            f"set --image-size {minimum}, or choose another network, such as resnet20."
        )


def _check_output(name: str, output: Any, classes: int) -> None:
    if not isinstance(output, Tensor):
        raise ConfigError(f"--peers {name}: it gives a {type(output).__name__}, not one tensor of logits.")
    if output.shape != (ROWS, classes):
        raise ConfigError(
            f"--peers {name}: {ROWS} images give an output of shape {list(output.shape)}, and logits have "
            f"[{ROWS}, {classes}]; its last layer must have as many outputs as there are classes."
        )


def _usable(trace: StageTrace) -> bool:
    return trace.calls == 1 and trace.shape is not None and len(trace.shape) in (3, 4) and trace.shape[0] == ROWS


def _check_stages(name: str, traces: Sequence[StageTrace], wanted: Sequence[str]) -> None:
    if not traces:
        raise ConfigError(
            f"--peers {name}: no stages found; name the sub-modules that end one with --stage-names, "
            "or give the network an attribute stage_names."
        )
    for trace in traces:
        if trace.calls != 1:
            raise ConfigError(
                f"--stage-names: {trace.name!r} of {name} runs {trace.calls} times in a forward pass; "
                "a stage must run exactly once."
            )
        if trace.shape is None or len(trace.shape) < 2 or trace.shape[0] != ROWS:
            shape = "no single tensor" if trace.shape is None else f"shape {list(trace.shape)}"
            raise ConfigError(
                f"--stage-names: {trace.name!r} of {name} gives {shape} for {ROWS} images; a stage gives one "
                "tensor whose first axis is the batch."
            )
    order = [trace.name for trace in traces]
    if order != list(wanted):
        raise ConfigError(f"--stage-names: the stages of {name} run in the order {' '.join(order)}; give them so.")


def _layout(trace: StageTrace, known: Layout | None) -> Layout:
    axes = len(trace.shape or ())
    if axes == 4:
        return known or "BCHW"
    return "BNC" if axes == 3 else "BC"
