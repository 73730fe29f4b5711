"""Makes an image larger by a model, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from pyvips import Image

from services.media.domain import Model, Upscale, require_writable
from services.media.operations import models
from services.media.operations.image import Picture, Source

TILES_AT_ONCE = 8  # enough to fill a batch, few enough that a large image does not keep others waiting
Bytes = NDArray[np.uint8]


def run(picture: Picture, operation: Upscale, _files: Mapping[str, Source]) -> Image:
    width, height = picture.width * operation.factor, picture.height * operation.factor
    require_writable(width, height)
    model = models.present().model("upscale")
    require_writable(picture.width * model.scale, picture.height * model.scale)  # what is held in memory
    pixels: Bytes = picture.pixels().numpy()
    is_opaque = pixels.shape[2] == 3
    colours = pixels if is_opaque else _seen(pixels, model.margin_px)
    large = Image.new_from_array(_enlarged(colours, model)).copy(interpretation="srgb")
    large = _sized(large, width, height, "lanczos3")
    if not is_opaque:
        alpha = Image.new_from_array(np.ascontiguousarray(pixels[..., 3]))
        large = large.bandjoin(_sized(alpha, width, height, "lanczos3"))
    return large


def _seen(pixels: Bytes, reach_px: int) -> Bytes:
    """Return the colours of `pixels` (rows, columns, 4), those of what is seen nearby where alpha is 0.

    What is hidden there would come out at the edges of what is seen, as far from them as the model looks.
    """
    image = Image.new_from_array(pixels)
    alpha, sigma = image[3], max(1, reach_px)  # the blur reaches farther than its sigma
    weight = alpha.cast("float").gaussblur(sigma, precision="float")
    nearby = (image[:3] * alpha).cast("float").gaussblur(sigma, precision="float") / weight  # 0 / 0 is 0 to libvips
    seen: Bytes = (alpha == 0).ifthenelse(nearby.rint().cast("uchar"), image[:3]).numpy()
    return seen


def _sized(image: Image, width: int, height: int, kernel: str) -> Image:
    if (image.width, image.height) == (width, height):
        return image
    return image.resize(width / image.width, vscale=height / image.height, kernel=kernel)


def _enlarged(pixels: Bytes, model: Model) -> Bytes:
    """Return `pixels` (rows, columns, 3) as the model enlarges them."""
    rows, columns, _ = pixels.shape
    margin, inner, scale = model.margin_px, model.side_px - 2 * model.margin_px, model.scale
    # Mirrored at the edges, as far as there is something to mirror: a tile has always the same size.
    right, below = margin + -columns % inner, margin + -rows % inner
    padded = np.pad(pixels, ((margin, below), (margin, right), (0, 0)), mode="symmetric")
    large = np.empty((rows * scale, columns * scale, 3), np.uint8)
    places = [(top, left) for top in range(0, rows, inner) for left in range(0, columns, inner)]
    for some in _portions(places):
        tiles = np.stack([padded[top : top + model.side_px, left : left + model.side_px] for top, left in some])
        items = (tiles.astype(np.float32) / 255 - np.array(model.mean, np.float32)) / np.array(model.std, np.float32)
        made = models.present().run(model, np.ascontiguousarray(items.transpose(0, 3, 1, 2)))
        made = (made.transpose(0, 2, 3, 1).clip(0, 1) * 255).round()
        edge = margin * scale
        for (top, left), tile in zip(some, made, strict=True):
            room = large[top * scale : (top + inner) * scale, left * scale : (left + inner) * scale]
            room[:] = tile[edge : edge + room.shape[0], edge : edge + room.shape[1]]
    return large


def _portions(places: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    for first in range(0, len(places), TILES_AT_ONCE):
        yield places[first : first + TILES_AT_ONCE]
