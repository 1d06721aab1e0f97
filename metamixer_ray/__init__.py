"""Online knowledge distillation with MetaMixer on Ray: ``from metamixer_ray import TrainConfig, train``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metamixer_ray.config import TrainConfig
    from metamixer_ray.train import train

__all__ = ["TrainConfig", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazy, so that the core rooms can be imported without Ray and MLflow.
    if name == "TrainConfig":
        from metamixer_ray.config import TrainConfig

        return TrainConfig
    if name == "train":
        from metamixer_ray.train import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
