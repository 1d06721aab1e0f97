"""The files that one trained network can be deployed as, and how each is read back.

``pt2`` and ``onnx`` hold a graph that takes raw images: uint8 [B, 3, H, W] of any B -> class probabilities float32
[B, C]; normalisation is in the graph. ``safetensors`` holds weights, and what it takes to build their network again.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from metamixer_ray.errors import ConfigError
from metamixer_ray.networks import NetworkConfig, StagedNetwork, build_network
from metamixer_ray.runs import Classes, Means, Side, Spreads
from metamixer_ray.tracking.models import ServedNetwork, quiet

INPUT, OUTPUT = "images", "probabilities"
_PT2_RECORD = "metadata.json"
# A dimension of size 1 would be taken for a constant.
_TRACED_BATCH = 2

Predict = Callable[[Tensor], Tensor]
"""uint8 [B, 3, H, W] on the CPU -> class probabilities float32 [B, C]."""


class RawNetwork(ServedNetwork):
    """A classifier of raw images with channels first: uint8 [B, 3, H, W] -> class probabilities float32 [B, C]."""

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> probabilities float32 [B, C]."""
        return self.probabilities(images)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a file tells of its network.

    Attributes:
        network: its name, as in ``--peers``.
        options: how networks of that name were built.
        classes: names, in the order of the outputs.
        mean, std: per channel, of images scaled to 0..1.
        image_size: height and width in pixels.
        source: the run and the peer.
    """

    network: str
    options: NetworkConfig
    classes: Classes
    mean: Means
    std: Spreads
    image_size: Side
    source: str

    def contract(self, file_format: str) -> dict[str, str]:
        """What goes in and what comes out, in words."""
        shape = f"[batch, 3, {self.image_size}, {self.image_size}]"
        if file_format == "safetensors":
            return {
                "input": f"float32 {shape}, RGB: (image / 255 - mean) / std per channel",
                "output": f"logits: float32 [batch, {len(self.classes)}]",
            }
        return {
            "input": f"{INPUT}: uint8 {shape}, RGB, raw: the graph normalises them",
            "output": f"{OUTPUT}: float32 [batch, {len(self.classes)}]",
        }

    def metadata(self, file_format: str) -> dict[str, str]:
        """The same as texts, which is all that two of the formats can hold; values that are no texts are JSON."""
        return {
            "network": self.network,
            "network_options": json.dumps(asdict(self.options)),
            "classes": json.dumps(self.classes),
            "mean": json.dumps(self.mean),
            "std": json.dumps(self.std),
            "image_size": json.dumps(self.image_size),
            "source": self.source,
            **self.contract(file_format),
        }


_CARD_JSON = {name: name for name in ("classes", "mean", "std", "image_size")} | {"options": "network_options"}


def read_card(metadata: Mapping[str, str]) -> Card:
    """The card in a file's metadata.

    Raises:
        ConfigError: there is none.
    """
    try:
        told: dict[str, Any] = {"network": metadata["network"], "source": metadata["source"]}
        told |= {name: json.loads(metadata[key]) for name, key in _CARD_JSON.items()}
        return TypeAdapter(Card).validate_python(told)
    except (KeyError, ValueError, RecursionError) as error:
        raise ConfigError(f"the file's metadata isn't that of an exported network: {error}") from None


def load_network(path: Path | str) -> tuple[StagedNetwork, Card]:
    """The network of a ``safetensors`` file, in evaluation mode on the CPU, and what the file tells of it.

    It maps normalised float32 [B, 3, H, W] to logits [B, C]. The file can name a ``module:function`` as its network,
    which is then imported and called: don't load files of strangers.

    Raises:
        ConfigError: not a file of this project's, a network that can't be built here, or no safetensors package.
    """
    FORMATS["safetensors"].check("safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            card = read_card(file.metadata() or {})
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} can't be read as safetensors: {error}") from None
    # Its first weights are drawn and replaced; the caller's random numbers stay as they were.
    with torch.random.fork_rng(devices=[]):
        network = build_network(
            card.network, classes=len(card.classes), image_size=card.image_size, config=card.options
        )
    try:
        network.network.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(
            f"{path}: its weights are not those of the {card.network} that is built here: {error}"
        ) from None
    return network.eval(), card


@dataclass(frozen=True)
class FileFormat:
    """How one kind of file is written and read.

    Attributes:
        packages: what it takes beside this project's own dependencies.
    """

    write: Callable[[nn.Module, Card, Path], None]
    read: Callable[[Path], Predict]
    packages: tuple[str, ...] = ()

    def check(self, name: str) -> None:
        """Raises: ConfigError: a package is missing."""
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            raise ConfigError(
                f"--format {name} needs {', '.join(missing)}: pip install '.[export]' in this project's folder, or "
                "choose --format pt2, which needs nothing more"
            )


def _trace(network: nn.Module, card: Card) -> torch.export.ExportedProgram:
    raw = RawNetwork(network, card.mean, card.std).eval()
    images = torch.zeros(_TRACED_BATCH, 3, card.image_size, card.image_size, dtype=torch.uint8)
    with torch.no_grad(), quiet():
        return torch.export.export(raw, (images,), dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}})


def _write_pt2(network: nn.Module, card: Card, path: Path) -> None:
    record = json.dumps(card.metadata("pt2"), indent=1)
    torch.export.save(_trace(network, card), path, extra_files={_PT2_RECORD: record})


def _read_pt2(path: Path) -> Predict:
    predict: Predict = torch.export.load(path).module()
    return predict


def _write_onnx(network: nn.Module, card: Card, path: Path) -> None:
    with quiet():
        program = torch.onnx.export(
            _trace(network, card),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: "batch"}},
        )
    assert program is not None
    program.model.metadata_props.update(card.metadata("onnx"))
    program.save(path)
    if len(list(path.parent.glob(f"{path.name}*"))) > 1:
        raise ConfigError("its weights are too large for the one file of an ONNX graph")


def _read_onnx(path: Path) -> Predict:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _write_safetensors(network: nn.Module, card: Card, path: Path) -> None:
    from safetensors.torch import save_file

    # Copies, since weights that two layers share would be refused.
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, path, metadata=card.metadata("safetensors"))


def _read_safetensors(path: Path) -> Predict:
    network, card = load_network(path)
    return RawNetwork(network, card.mean, card.std).eval()


FORMATS: Mapping[str, FileFormat] = {
    "onnx": FileFormat(_write_onnx, _read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "pt2": FileFormat(_write_pt2, _read_pt2),
    "safetensors": FileFormat(_write_safetensors, _read_safetensors, ("safetensors",)),
}
