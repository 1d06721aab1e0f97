"""Rows and images like those of real trainings, for all tests of this room."""

import math
from typing import Any

import numpy as np


def make_rows(peers: int, epochs: int, *, every: int = 1, shift: float = 0.0, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of ``epochs`` epochs, evaluated every so many; accuracies rise towards 0.63 + ``shift``."""
    rng = np.random.default_rng(seed)
    rows = []
    for epoch in range(1, epochs + 1):
        tested = epoch % every == 0 or epoch == epochs
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": 16 * epoch,
            "time": 1.7e9 + 3 * epoch,
            "seconds": 3.0,
            "elapsed": 3.0 * epoch,
            "images_per_second": 1234.5,
            "split": "test",
            "peers": [],
            "ensemble": {"top1": 0.65, "top5": 0.97, "nll": 1.1, "ece": 0.02} if tested else None,
            "agreement": 0.9 if tested else None,
            "exchange": {"bytes_per_step": 51200, "seconds_per_step": 0.0021, "wait_fraction": 0.03},
            "skipped_steps": 0,
        }
        for peer in range(peers):
            top1 = 0.63 + shift - 0.004 * peer - 0.5 * math.exp(-5 * epoch / epochs) + 0.005 * rng.normal()
            scores: dict[str, Any] = {
                "name": f"{peer}-resnet{14 - 2 * (peer % 4)}",
                "loss": 2.3 * math.exp(-3 * epoch / epochs) + 0.5,
                "cross_entropy": 1.1,
                "kd": 0.2,
                "statistics": 0.0,
                "train_top1": top1 + 0.1,
                "lr": 0.1,
            }
            if tested:
                scores |= {
                    "top1": top1,
                    "top5": 0.95,
                    "nll": 1.2,
                    "ece": 0.03,
                    "attention_agreement": [0.9, 0.8, 0.7],
                }
            row["peers"].append(scores)
        rows.append(row)
    return rows


def make_images(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """uint8 [count, 3, size, size] with large blobs."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 3, 4, 4), dtype=np.uint8)
    return coarse.repeat(size // 4, axis=2).repeat(size // 4, axis=3)
