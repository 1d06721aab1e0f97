"""One trained network as a file for deployment: ``python -m metamixer_ray.export RUN --peer 0 --format onnx``.

The file is read back and compared with the original on real images before it is put in place.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from metamixer_ray.cli import run_command
from metamixer_ray.errors import ConfigError
from metamixer_ray.export_formats import FORMATS, Card, Predict, RawNetwork, load_network
from metamixer_ray.folder import RunFolder
from metamixer_ray.planning.table import size
from metamixer_ray.reporting import first_line
from metamixer_ray.tracking.naming import model_name
from metamixer_ray.tracking.summary import count, percent
from metamixer_ray.trained import RunOptions, TrainedRun, find_run, open_trained

__all__ = ["ExportOptions", "Exported", "export_peer", "load_network", "main"]

IMAGES_COMPARED = 256
BATCH = 64
TOLERANCE = 1e-4
"""Largest difference between probabilities that is taken for rounding."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(RunOptions):
    """Write one trained network as a file for deployment, compared with the original on images of the test split."""

    peer: str | None = None
    """Which peer: its number (from 0), its name (peer0-resnet14), or its network where only one peer has that. Not
    needed for a single peer."""
    format: Literal["onnx", "pt2", "safetensors"] = "onnx"
    """onnx or pt2 (torch.export): a graph from raw uint8 images to probabilities. safetensors: weights, which
    metamixer_ray.export.load_network builds a network of."""
    output: str | None = None
    """The file to write, a local path. Default: export/PEER.FORMAT in the run's folder."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        peer: its name.
        parameters: how many.
        size: of the file, in bytes.
        images: how many were compared, of which ``split``.
        difference: the largest between two probabilities, of the original and of the file.
        agreement: fraction of the images on which both predict the same class.
    """

    path: str
    peer: str
    parameters: int
    card: Card
    size: int
    split: str
    images: int
    difference: float
    agreement: float


def export_peer(folder: RunFolder, options: ExportOptions) -> Exported:
    """Write one network of the run in ``folder``; what is in the file computes in float32 on the CPU.

    Raises:
        UserError: no such run or peer, data that doesn't fit, a missing package, a network that the format can't
            hold, a file that doesn't answer as the original, or a link that leads out of the folder that it is
            written to. Then nothing is written.
    """
    file_format = FORMATS[options.format]
    file_format.check(options.format)
    target = _target(folder, options)
    if target is None:
        folder.check_links()
    run = open_trained(folder, options)
    peer = find_peer(run, options.peer)
    network, name = run.networks[peer].plain().eval(), run.names[peer]
    card = Card(
        network=run.config.peers[peer],
        options=run.config.networks,
        classes=run.classes,
        mean=run.mean,
        std=run.std,
        image_size=run.image_size,
        source=f"run {folder.name}, {name}",
    )
    images = _images(run)
    original = RawNetwork(network, card.mean, card.std).eval()
    with tempfile.TemporaryDirectory(prefix="metamixer_ray-") as scratch:
        path = Path(scratch) / f"network.{options.format}"
        try:
            file_format.write(network, card, path)
            difference, agreement = compare(original, file_format.read(path), images)
        except Exception as error:
            problem = f"{name} can't be exported ({type(error).__name__}: {first_line(error)})"
            if options.format != "safetensors":
                problem += (
                    "; its forward pass must be traceable, for any number of images, or --format safetensors be used, "
                    "which traces nothing"
                )
            raise ConfigError(f"--format {options.format}: {problem}") from error
        # Also refuses NaN.
        if not difference <= TOLERANCE:
            raise ConfigError(
                f"--format {options.format}: the file doesn't answer as {name} does: probabilities differ by up to "
                f"{difference:.1e} on {len(images)} images of {run.split} (allowed: {TOLERANCE:.0e}), so it was not "
                "kept; try another --format"
            )
        content = path.read_bytes()
    place, file = target or (folder, f"export/{model_name(name)}.{options.format}")
    try:
        place.write(file, content)
    except OSError as error:
        raise ConfigError(f"{place}/{file} can't be written ({error}): give another place by --output") from None
    return Exported(
        path=f"{place}/{file}",
        peer=name,
        parameters=sum(p.numel() for p in network.parameters()),
        card=card,
        size=len(content),
        split=run.split,
        images=len(images),
        difference=difference,
        agreement=agreement,
    )


def find_peer(run: TrainedRun, wanted: str | None) -> int:
    """The number of the peer that ``--peer`` names.

    Raises:
        ConfigError: none is named so, or several are.
    """
    names = [(str(i), f"peer{i}", name, run.config.peers[i]) for i, name in enumerate(run.names)]
    found = [i for i, known in enumerate(names) if wanted is None or wanted in known]
    if len(found) != 1:
        problem = "which one?" if wanted is None else "there is no such peer." if not found else "that is several."
        raise ConfigError(
            f"--peer{f' {wanted}' if wanted else ''}: {problem} Give the number (from 0) or the name of one of "
            f"{', '.join(run.names)}"
        )
    return found[0]


@torch.inference_mode()
def compare(original: Predict, other: Predict, images: Tensor) -> tuple[float, float]:
    """The largest difference between the probabilities that both give, and how often both predict the same class.

    Args:
        images: uint8 [N, 3, H, W]; the first is shown alone, the others in batches.
    """
    pairs = [(original(part), other(part)) for part in (images[:1], *images[1:].split(BATCH)) if len(part)]
    ours, theirs = (torch.cat(each) for each in zip(*pairs, strict=True))
    same = (ours.argmax(dim=1) == theirs.argmax(dim=1)).double().mean()
    return float((ours - theirs).abs().max()), float(same)


def _images(run: TrainedRun) -> Tensor:
    """Images of the whole split, evenly spread over it."""
    number = min(IMAGES_COMPARED, len(run.images))
    return run.images.take(torch.linspace(0, len(run.images) - 1, number).long())


def _target(folder: RunFolder, options: ExportOptions) -> tuple[RunFolder, str] | None:
    if options.output is None:
        return None
    if "://" in options.output:
        raise ConfigError(
            f"--output {options.output}: give a local path; without it, the file goes into the run's folder {folder}"
        )
    path = Path(os.path.expanduser(options.output)).absolute()
    if os.path.isdir(path):
        raise ConfigError(f"--output {path} is a folder; name a file in it, such as {path}/network.{options.format}")
    place = RunFolder(str(path.parent), option="--output")
    place.create()
    return place, path.name


def as_text(exported: Exported, file_format: str) -> str:
    """What was written, in lines."""
    contract = exported.card.contract(file_format)
    classes = ", ".join(exported.card.classes[:10]) + (", ..." if len(exported.card.classes) > 10 else "")
    return "\n".join(
        [
            f"{exported.peer}, {count(exported.parameters)} parameters",
            f"file      {exported.path} ({size(exported.size)})",
            f"input     {contract['input']}",
            f"output    {contract['output']}: {classes}",
            f"checked   on {exported.images} images of {exported.split}: probabilities differ by "
            f"{exported.difference:.1e} at most (allowed: {TOLERANCE:.0e}), same class on "
            f"{percent(exported.agreement)} %",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m metamixer_ray.export``; returns its exit status."""

    def body(words: Sequence[str]) -> None:
        options: ExportOptions = tyro.cli(ExportOptions, prog="python -m metamixer_ray.export", args=list(words))
        print(as_text(export_peer(find_run(options.run), options), options.format))

    return run_command(body, argv)


if __name__ == "__main__":
    sys.exit(main())
