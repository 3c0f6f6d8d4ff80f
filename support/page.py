"""Pieces of a page: pictures with a square of buttons over them, and rows of small ones, as HTML."""

import base64
import html
import io
import math

import torch
from torchvision.transforms import functional as pixels

from support.images import eight_bits

# A click on a button tells Python its number.
CLICK = """element.addEventListener('click', event => {
    const cell = event.target.closest('[data-cell]');
    if (cell) trigger('click', {cell: Number(cell.dataset.cell)});
})"""

STYLE = """
.beside { display: flex; flex-wrap: wrap; gap: 1rem }
.beside > div { flex: 1 1 15rem; max-width: 27rem }
.picture { position: relative; aspect-ratio: 1; border: 1px solid #8888 }
.picture img { width: 100%; height: 100%; image-rendering: pixelated }
.cells { position: absolute; inset: 0; display: grid }
.cells button { border: 1px solid #8884; color: white; font: .7rem monospace; overflow: hidden;
    text-shadow: 0 0 2px black, 0 0 3px black, 0 0 4px black }
.cells .changed { box-shadow: inset 0 0 0 2px orange }
.cells .marked { outline: 3px solid red; z-index: 1 }
.cells .empty { background: #ccc }
.tiles { display: flex; flex-wrap: wrap; gap: 4px; margin: 4px 0 12px; max-height: 26rem; overflow-y: auto }
.tiles button { border: 2px solid #8884; font: .7rem monospace }
.tiles img { width: 48px; height: 48px }
.cells button:hover, .tiles button:hover { border: 2px solid #6af }
"""


def url_of(picture):
    """A PIL image, or one (3, H, W) of bytes or of floats in [0, 1], as a URL that holds its PNG."""
    if isinstance(picture, torch.Tensor):
        picture = pixels.to_pil_image(eight_bits(picture) if picture.is_floating_point() else picture)
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def picture_of(image, cells=(), **marks):
    """An image (3, H, W), and over it buttons with the texts `cells`; marks: the places of each class in STYLE."""
    side = math.isqrt(len(cells))
    buttons = "".join(
        f'<button data-cell="{place}" class="{" ".join(name for name, some in marks.items() if place in some)}">{text}'
        "</button>" for place, text in enumerate(cells))
    return (f'<div class="picture"><img src="{url_of(image)}" alt=""><div class="cells" style="grid: '
            f'repeat({side}, 1fr) / repeat({side}, 1fr)">{buttons}</div></div>')


def tiles_of(tiles):
    """Small pictures in rows: of each its number, its URL, what it is, and the text below it."""
    return '<div class="tiles">' + "".join(
        f'<button data-cell="{cell}" title="{html.escape(title)}"><img src="{url}" alt="">{text}</button>'
        for cell, url, title, text in tiles) + "</div>"


def beside(*parts):
    """Pieces of HTML next to each other."""
    return '<div class="beside">' + "".join(f"<div>{part}</div>" for part in parts) + "</div>"
