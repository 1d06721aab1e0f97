"""All at once: mixing, distillation, optimisation and peers. Many dimensions want many samples: a hundred or more."""

from typing import Any

from tune_spaces import distillation, mixing, optimisation, peers


def space() -> dict[str, Any]:
    """The four other spaces, joined."""
    return mixing.space() | distillation.space() | optimisation.space() | peers.space()
