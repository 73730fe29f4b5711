"""Where faces are, by OpenCV's cascade of Haar features, of its package. Where OpenCV does not work none are found.

docs/decisions/0025 says why. Source: Viola, Jones, "Rapid object detection using a boosted cascade of simple
features", CVPR 2001.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from pyvips import Image

from services.media.domain import Box

LOOKED_AT_PX = 640  # faces that matter to a crop are large
SMALLEST_SHARE = 0.04  # of the longer side
AGREEING = 6  # neighbouring windows that must find the same face: fewer see faces in foliage


def found(image: Image) -> list[Box]:
    """Return the faces of an image that is in memory, largest first."""
    detector = _detector()
    if detector is None:
        return []
    grey = image.thumbnail_image(LOOKED_AT_PX, height=LOOKED_AT_PX, size="down").colourspace("b-w")[0]
    scale = image.width / grey.width
    side = max(12, round(SMALLEST_SHARE * max(grey.width, grey.height)))
    seen = detector.detectMultiScale(grey.numpy(), scaleFactor=1.1, minNeighbors=AGREEING, minSize=(side, side))
    boxes = [Box(*(round(int(each) * scale) for each in face)) for face in seen]
    return sorted(boxes, key=lambda box: -box.width * box.height)


@cache
def _detector() -> Any:
    try:
        return detector()
    except Exception:  # noqa: BLE001 - whatever OpenCV's import meets where something of it is missing
        return None


def detector() -> Any:
    """Return OpenCV's.

    Raises:
        Exception: it is not installed, lacks a library of the system or its cascade, or was made for another NumPy.
    """
    import cv2.data  # noqa: PLC0415 - loaded by who asks for faces, where it is installed

    cv2.setNumThreads(1)  # the slots of a worker use the other cores
    cascade = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_alt2.xml")
    if cascade.empty():
        raise RuntimeError("OpenCV has no cascade.")
    return cascade
