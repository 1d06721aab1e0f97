"""Troubles that a test hears of, without a cluster in between."""

from metamixer_ray.troubles import Troubles


class Told(Troubles):
    """What was said of troubles."""

    def __init__(self) -> None:
        super().__init__("test")
        self.texts: list[str | None] = []

    def say(self, kind: str, text: str | None) -> None:
        self.texts.append(text)
