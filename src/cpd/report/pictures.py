"""Pictures of samples: an image beside maps of its classes, as PNGs small enough for the page."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["STYLE", "Picture", "picture", "section"]

_SIDE = 160  # pixels at most: what is larger is thinned out
STYLE = """
.pictures { display: grid; gap: .5rem; justify-content: start; }
.pictures figure { margin: 0; }
.pictures figcaption { color: var(--soft); font-size: .85rem; text-align: center; }
.pictures img { display: block; width: 8rem; height: auto; image-rendering: pixelated; }
"""


@dataclass(frozen=True)
class Picture:
    """One sample: ``panels`` maps what is seen ("image", "label", …) to a PNG in base64."""

    title: str
    panels: Mapping[str, str]


def picture(title: str, image: Any, maps: Mapping[str, Any]) -> Picture:
    """Draw a sample. Needs matplotlib.

    image: (channels, H, W), stretched to its own range; three channels are colours, of others the
    first is shown. maps: name → the class of each pixel, integers (H, W); below 0 is no class, and
    white. Colours of classes are those of the PASCAL VOC development kit: class 0 is black.
    """
    shown = np.asarray(image, dtype=np.float64)
    shown = shown if shown.shape[0] == 3 else np.repeat(shown[:1], 3, axis=0)
    low, high = shown.min(), shown.max()
    shown = (shown - low) / (high - low) if high > low else np.zeros_like(shown)
    pixels = (shown.transpose(1, 2, 0) * 255).round().astype(np.uint8)
    panels = {"image": _png(pixels)}
    for name, classes in maps.items():
        panels[name] = _png(colours(np.asarray(classes)))
    return Picture(title, panels)


def colours(classes: NDArray[Any]) -> NDArray[np.uint8]:
    """Integers (H, W) → colours (H, W, 3): bit 3j + c of a class is bit 7 − j of channel c."""
    found = np.zeros((*classes.shape, 3), dtype=np.uint8)
    known = np.maximum(classes, 0).astype(np.int64)
    for place in range(8):
        for channel in range(3):
            bit = (known >> (3 * place + channel)) & 1
            found[..., channel] |= (bit << (7 - place)).astype(np.uint8)
    found[classes < 0] = 255
    return found


def _png(pixels: NDArray[np.uint8]) -> str:
    """Colours (H, W, 3), thinned out where they are many, as a PNG in base64."""
    from matplotlib.image import imsave

    step = -(-max(pixels.shape[:2]) // _SIDE)
    stream = io.BytesIO()
    thin = np.ascontiguousarray(pixels[::step, ::step])
    imsave(stream, thin, format="png")
    return b64encode(stream.getvalue()).decode()


def section(pictures: tuple[Picture, ...]) -> str:
    """HTML: a row for each sample, a column for each panel."""
    columns = max((len(each.panels) for each in pictures), default=0)
    rows = []
    for each in pictures:
        for name, png in each.panels.items():
            said = escape(f"{each.title}: {name}")
            rows.append(
                f'<figure><img alt="{said}" src="data:image/png;base64,{escape(png)}">'
                f"<figcaption>{escape(name)}</figcaption></figure>"
            )
        rows += ["<span></span>"] * (columns - len(each.panels))
    grid = f"grid-template-columns: repeat({columns}, 8rem)"
    return f'<div class="pictures" style="{grid}">\n' + "\n".join(rows) + "\n</div>"
