"""Which arithmetic a worker uses: bf16 autocast where the hardware has it natively, float32 elsewhere, or fp16."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from metamixer_ray.errors import ConfigError

Precision = Literal["auto", "bf16", "fp16", "float32"]
Arithmetic = Literal["bf16", "fp16", "float32"]

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def native_bf16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 in hardware: CUDA since Ampere, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return torch.backends.mkldnn.is_available() and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def resolve_precision(precision: Precision, device: torch.device) -> Arithmetic:
    """What ``--precision`` means on this device.

    Raises:
        ConfigError: bf16 asked for on a GPU that would emulate it.
    """
    if precision == "auto":
        return "bf16" if native_bf16(device) else "float32"
    if precision == "bf16" and device.type == "cuda" and not native_bf16(device):
        raise ConfigError(
            f"--precision bf16: {torch.cuda.get_device_name(device)} has no native bf16; use --precision fp16 or "
            "float32"
        )
    return precision


def autocast(precision: Arithmetic, device: torch.device) -> AbstractContextManager[object]:
    """The context that a forward pass runs in."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_HALF[precision])
