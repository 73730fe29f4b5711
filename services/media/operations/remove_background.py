"""Keeps what a picture is of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pyvips import Image

from services.media.domain import WHITE, Defocus, Model, RemoveBackground
from services.media.operations import models
from services.media.operations.image import Made, Picture, Source, flattened, rgb

FOCUS_PX = 4.0  # a blur is computed where its standard deviation is this: no eye sees the rest


def run(picture: Picture, operation: RemoveBackground, files: Mapping[str, Source]) -> Image:
    if not isinstance(picture, Source):  # a file is read again, which is cheaper than keeping its pixels
        picture = Made(picture.pixels().copy_memory())
    alpha = _alpha(picture)
    pixels = picture.pixels()
    if pixels.hasalpha():  # what was transparent stays so
        if operation.blur:
            pixels = pixels.copy_memory()  # all of it is looked at before what it lies on is known
        alpha = (alpha * pixels[3] / 255).cast("uchar")
    pixels = pixels[:3]
    if operation.colour:
        behind = pixels.new_from_image(rgb(operation.colour))
    elif operation.blur:
        behind = _blurred(picture, alpha, operation.blur)
    elif operation.image:
        behind = flattened(files[operation.image.file_id].filling(pixels.width, pixels.height), WHITE)
    else:
        cut = pixels.bandjoin(alpha)
        # Colours that nobody sees are not worth their bytes.
        return (alpha == 0).ifthenelse([0, 0, 0, 0], cut).copy(interpretation="srgb")
    return alpha.ifthenelse(pixels, behind, blend=True).copy(interpretation="srgb")


def _alpha(picture: Picture) -> Image:
    """Return how much of each pixel is foreground, 0..255, in the size of the image."""
    model = models.present().model("remove_background")
    small = flattened(picture.pixels(model.side_px, model.side_px, size="force"), WHITE)
    (found,) = models.present().run(model, _item(small, model))[:, 0]
    low, high = float(found.min()), float(found.max())
    share = (found - low) / max(high - low, 1e-6)  # as the model was trained to be read
    mask = Image.new_from_array(np.ascontiguousarray(share * 255).round().astype(np.uint8))
    across, down = picture.width / mask.width, picture.height / mask.height
    return mask.resize(across, vscale=down, kernel="linear").cast("uchar")


def _item(image: Image, model: Model) -> models.Pixels:
    values = image.numpy().astype(np.float32)
    # Brightest to 1, then what the colours of photographs are on average, as U²-Net was trained.
    values /= max(float(values.max()), 1e-6)
    values = (values - np.array(model.mean, np.float32)) / np.array(model.std, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


def _blurred(picture: Picture, alpha: Image, blur: Defocus) -> Image:
    """Return the background out of focus, without the foreground's colours around its edge."""
    width, height = picture.width, picture.height
    shrink = max(1.0, blur.radius * max(width, height) / FOCUS_PX)
    small_width, small_height = max(1, round(width / shrink)), max(1, round(height / shrink))
    small = flattened(picture.pixels(small_width, small_height, size="force"), WHITE)
    outside = 255 - alpha.thumbnail_image(small_width, height=small_height, size="force")
    sigma = blur.radius * max(width, height) / shrink
    weight = (outside + 1).cast("float").gaussblur(sigma, precision="float")  # + 1: something behind everything
    colours = ((small * (outside + 1)).cast("float").gaussblur(sigma, precision="float") / weight).cast("uchar")
    colours = colours.copy_memory()  # small, and each of its pixels is asked for many times
    return colours.resize(width / colours.width, vscale=height / colours.height, kernel="linear")
