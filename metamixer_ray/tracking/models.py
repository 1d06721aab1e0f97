"""Export of a peer's network as an MLflow model that predicts on raw images and needs none of this package.

The format is ``pt2`` (`torch.export`): the graph with its weights, no pickled classes. Normalisation is in
the graph.
"""

import copy
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor, nn

_TRACED_BATCH = 2  # torch.export makes a dimension of size 1 constant, so a batch to trace needs at least 2


class ModelExportError(RuntimeError):
    """A network can't be exported; the message says which and why. The training is not affected."""


class ServedNetwork(nn.Module):
    """A classifier that takes raw images: uint8 [N, H, W, 3] -> class probabilities float32 [N, C].

    Args:
        network: maps normalised float32 [N, 3, H, W] to logits [N, C].
        mean, std: per channel, of images scaled to 0..1.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> probabilities float32 [N, C]."""
        return self.probabilities(images.permute(0, 3, 1, 2))

    def probabilities(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> probabilities float32 [N, C]."""
        scaled = images.to(torch.float32) / 255
        return torch.softmax(self.network((scaled - self.mean) / self.std).float(), dim=1)


def export_network(
    network: nn.Module,
    folder: Path,
    *,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    example: np.ndarray | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``network`` as an MLflow model into ``folder`` (replaced if it is there) and return the folder.

    It loads anywhere, with or without a tracking server:
    ``mlflow.pyfunc.load_model(folder).predict(images)`` maps uint8 [N, H, W, 3] to probabilities float32
    [N, C]; the class names are ``load_model(folder).metadata.metadata["classes"]``. The network itself is
    left untouched.

    Args:
        network: maps normalised float32 [N, 3, H, W] to logits [N, C]; a copy of it is exported, on the CPU.
        classes: names, in the order of the outputs.
        mean, std: per channel, of images scaled to 0..1.
        image_size: height and width H = W.
        example: uint8 [n, H, W, 3] with n >= 2, kept as the input example (its first two); default random
            pixels.
        metadata: more to be kept with the model, JSON values.

    Raises:
        ModelExportError: the network's forward pass can't be traced, or its graph fits one batch size only.
    """
    import mlflow.pytorch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    served = ServedNetwork(copy.deepcopy(network).to("cpu", torch.float32), mean, std).eval()
    shape = (image_size, image_size, 3)
    if example is None:
        example = np.random.default_rng(0).integers(0, 256, (_TRACED_BATCH, *shape), dtype=np.uint8)
    # Tensors without names: MLflow would pass named ones as a dict, which its PyTorch flavour then refuses.
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *shape))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(classes)))]),
    )
    description = Model(metadata={"classes": list(classes), "mean": list(mean), "std": list(std), **(metadata or {})})
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad(), quiet():
            mlflow.pytorch.save_model(
                served,
                str(folder),
                mlflow_model=description,
                signature=signature,
                input_example=np.ascontiguousarray(example[:_TRACED_BATCH]),
                serialization_format="pt2",
                # Given, not inferred: inference loads the model in a new process, which takes a minute.
                pip_requirements=[f"{name}=={_release(name)}" for name in ("mlflow", "torch", "numpy")],
            )
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ModelExportError(f"the network can't be exported with torch.export: {_first_line(error)}") from error
    if not _any_batch(folder / "data" / "model.pt2"):
        shutil.rmtree(folder, ignore_errors=True)
        raise ModelExportError(
            "the network's graph fits one batch size only; its forward pass must not turn the batch size "
            "into a constant (write x.flatten(1) or x.reshape(x.shape[0], -1))"
        )
    _prefer_cpu(folder)
    _compact_examples(folder)
    return folder


def _any_batch(archive: Path) -> bool:
    """Whether the graph's input has a free batch size, read from its JSON: loading takes as long as exporting."""
    with ZipFile(archive) as records:
        name = next(name for name in records.namelist() if name.endswith("models/model.json"))
        tensors = json.loads(records.read(name))["graph_module"]["graph"]["tensor_values"]
    return "as_int" not in tensors["images"]["sizes"][0]


def _prefer_cpu(folder: Path) -> None:
    """Name the device of the exported weights, which is fixed: else MLflow fails wherever there is a GPU."""
    from mlflow.models import Model

    model = Model.load(str(folder))
    model.flavors["python_function"]["config"] = {"device": "cpu"}
    model.save(str(folder / "MLmodel"))


def _compact_examples(folder: Path) -> None:
    """Rewrite the example's JSON without one line per pixel, which is six times as long."""
    for path in folder.glob("*input_example.json"):
        path.write_text(json.dumps(json.loads(path.read_text()), separators=(",", ":")))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log messages of the exporters, which are about their own workings."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "torch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _release(package: str) -> str:
    return version(package).partition("+")[0]  # a local label such as +cu130 is on no package index


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
