"""How peers step: learning rate, weight decay and batch."""

from typing import Any

from hyperopt import hp


def space() -> dict[str, Any]:
    """The optimizer's settings, the same for all peers."""
    return {
        "lr": hp.loguniform("lr", -4.6, -0.7),  # 0.01 to 0.5
        "weight_decay": hp.loguniform("weight_decay", -9.2, -5.8),  # 1e-4 to 3e-3
        "batch_size": hp.choice("batch_size", [32, 64, 128]),
    }
