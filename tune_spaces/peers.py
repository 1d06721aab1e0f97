"""Who learns together: architectures and number. Small networks; for others write a space of your own like this one."""

from typing import Any

from hyperopt import hp


def space() -> dict[str, Any]:
    """Two to four peers, alike or not."""
    return {
        "peers": hp.choice(
            "peers",
            [
                ["resnet8", "resnet8"],
                ["resnet14", "resnet8"],
                ["resnet14", "resnet14"],
                ["resnet14", "resnet14", "resnet14"],
                ["resnet20", "resnet14"],
                ["resnet14", "resnet14", "resnet14", "resnet14"],
            ],
        )
    }
