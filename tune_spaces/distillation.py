"""What peers learn from each other: how strongly, from when on, how softened, and whether also where they look."""

from typing import Any

from hyperopt import hp


def space() -> dict[str, Any]:
    """The distillation's settings; weight and temperature only where peers learn from each other at all."""
    return {
        "learning": hp.choice(
            "learning",
            [
                {
                    # Not okddip, which two peers can't do: add it for three or more.
                    "distiller": hp.choice(
                        "distiller",
                        [
                            *("dml", "ensemble", "ensemble-gated", "kdcl-naive", "kdcl-linear", "kdcl-minlogit"),
                            *("kdcl-general", "codistillation", "mcl"),
                        ],
                    ),
                    "kd_weight": hp.loguniform("kd_weight", -2.3, 1.4),  # 0.1 to 4
                    "temperature": hp.uniform("temperature", 1.0, 6.0),
                    "kd_warmup_epochs": hp.choice("kd_warmup_epochs", [None, 0.0, 2.0, 5.0]),
                },
                {"distiller": "none"},
            ],
        ),
        "looking": hp.choice(
            "looking",
            [
                {"statistics_weight": 0.0},
                {
                    "statistics": hp.choice("statistics", ["attention", "similarity"]),
                    "statistics_weight": hp.loguniform("statistics_weight", -4.6, 0.0),  # 0.01 to 1
                },
            ],
        ),
    }
