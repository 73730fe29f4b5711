"""How alike two images look: mean structural similarity of the luminance, at full resolution.

Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity",
IEEE Transactions on Image Processing 13 (2004); Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03.
"""

from __future__ import annotations

from pyvips import Image

_LUMA = Image.new_from_array([[0.299, 0.587, 0.114]])  # ITU-R BT.601
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def ssim(image: Image, other: Image) -> float:
    """Return the similarity of two sRGB images of one size, at most 1.

    Transparent ones are laid on black and on white, and count as alike as they are on the worse of these.
    """
    if not (image.hasalpha() or other.hasalpha()):
        return _opaque(image, other)
    image, other = image.copy_memory(), other.copy_memory()  # each is read twice
    return min(
        _opaque(*(each.flatten(background=behind) if each.hasalpha() else each for each in (image, other)))
        for behind in (0, 255)
    )


def _opaque(image: Image, other: Image) -> float:
    x, y = image[:3].recomb(_LUMA), other[:3].recomb(_LUMA)
    blurred = x.bandjoin([y, x * x + y * y, x * y]).gaussblur(1.5, min_ampl=0.003, precision="float")
    mean_x, mean_y, squares, product = blurred.bandsplit()
    means, mean_squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    alike = (2 * means + _C1) * (2 * (product - means) + _C2)
    scale = (mean_squares + _C1) * (squares - mean_squares + _C2)
    return float((alike / scale).avg())
