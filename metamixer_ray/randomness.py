"""Random numbers without state: every draw is a pure function of a seed, a purpose and a few integers.

Nothing here is ever saved or sent. Any process that knows ``(seed, purpose, epoch, step, ...)`` draws the same
numbers, which is why peers agree on a mix without exchanging a byte and why a resumed run continues bit for bit.
"""

import zlib

import numpy as np
import torch


def _sequence(seed: int, purpose: str, keys: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *keys])


def numpy_generator(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """A fresh NumPy generator (Philox) for ``purpose``; ``keys`` are non-negative integers such as epoch, step."""
    return np.random.Generator(np.random.Philox(_sequence(seed, purpose, keys)))


def torch_seed(seed: int, purpose: str, *keys: int) -> int:
    """A 63-bit integer seed for ``torch.manual_seed`` or a ``torch.Generator``."""
    return int(_sequence(seed, purpose, keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_generator(seed: int, purpose: str, *keys: int) -> torch.Generator:
    """A fresh CPU ``torch.Generator`` for ``purpose``."""
    return torch.Generator().manual_seed(torch_seed(seed, purpose, *keys))


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed the generators that a network on ``device`` draws from.

    The same as ``torch.manual_seed`` for these; that one also seeds every other kind of device, which takes
    milliseconds.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
