"""How batches are mixed: MetaMixer's pairing, strengths, probabilities and stages.

What doesn't matter for a choice isn't searched with it: with both stages decided by one coin there is one probability.
"""

from typing import Any

from hyperopt import hp


def space() -> dict[str, Any]:
    """MetaMixer's settings."""
    return {
        "pairing": hp.choice("pairing", ["cross-class", "within-class", "free"]),
        "local_alpha": hp.loguniform("local_alpha", -1.6, 1.6),  # 0.2 to 5
        "global_alpha": hp.loguniform("global_alpha", -1.6, 1.6),
        "coins": hp.choice(
            "coins",
            [
                {
                    "mix_together": False,
                    "local_probability": hp.uniform("local_probability", 0.0, 1.0),
                    "global_probability": hp.uniform("global_probability", 0.0, 1.0),
                },
                {"mix_together": True, "local_probability": hp.uniform("both_probability", 0.1, 1.0)},
            ],
        ),
        # 0 is the input, k before stage k + 1; None is every one that the networks have.
        "mix_stages": hp.choice("mix_stages", [None, [0], [1], [0, 1], [1, 2]]),
        "off_epochs": hp.choice("off_epochs", [0, 2, 5]),
    }
