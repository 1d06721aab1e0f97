"""A page of small pictures and captions, each put so many inches from its upper left corner.

One axes holds them all: a sheet with one for each picture takes three times as long to draw.
"""

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

_LUMA = np.array([0.299, 0.587, 0.114])

TITLE_HEIGHT = 0.45


class PicturePage:
    """A figure of ``width`` by ``height`` inches with a title in the uppermost ``TITLE_HEIGHT`` of it.

    Attributes:
        figure: what was put on it so far; places and lengths are in inches.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self.figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
        self.text(width / 2, TITLE_HEIGHT / 2, title, va="center", fontsize=13, fontweight="bold")

    def text(self, x: float, y: float, text: str, **look: Any) -> None:
        """Put a text at a place: centred, and below it, if its looks don't say otherwise."""
        self.axes.text(x, y, text, **{"ha": "center", "va": "top"} | look)

    def image(self, x: float, y: float, side: float, image: np.ndarray) -> None:
        """Put a uint8 [3, H, W] image into a square of ``side`` inches, of which (x, y) is the upper left corner."""
        self._put(x, y, side, image.shape[-2:], np.moveaxis(image, 0, -1), interpolation=_smoothing(image))

    def attention(self, x: float, y: float, side: float, image: np.ndarray, attention: np.ndarray) -> None:
        """The same with the image in grey, and over it in colour an attention map, non-negative [h, w] of any h, w.

        The less attention, the more transparent the colour, so that the image stays recognisable.
        """
        grey, shape = np.tensordot(_LUMA, np.asarray(image, dtype=np.float64), axes=1), image.shape[-2:]
        self._put(x, y, side, shape, grey, cmap="gray", vmin=-60, vmax=275, interpolation=_smoothing(image))
        peak = float(attention.max())
        strength = np.asarray(attention / peak if peak > 0 else attention, dtype=np.float64)
        alpha = 0.15 + 0.6 * strength
        self._put(x, y, side, shape, strength, cmap="plasma", vmin=0, vmax=1, alpha=alpha, interpolation="bilinear")

    def _put(self, x: float, y: float, side: float, shape: tuple[int, ...], pixels: np.ndarray, **options: Any) -> None:
        """Fill the largest middle of the square that has the shape (height, width), and draw a thin line around it,
        so that a white image has an edge."""
        height, width = (side * length / max(shape) for length in shape)
        left, top = x + (side - width) / 2, y + (side - height) / 2
        self.axes.imshow(pixels, extent=(left, left + width, top + height, top), aspect="auto", **options)
        self.axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor="#BBBBBB", linewidth=0.5))


def _smoothing(image: np.ndarray) -> str:
    """How an image [..., H, W] is scaled: pixels of small ones stay squares, large ones are smoothed."""
    return "nearest" if max(image.shape[-2:]) <= 128 else "antialiased"
