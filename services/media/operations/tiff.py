"""What a TIFF's tags say and libvips does not: whether it is a camera's raw file, and what its extra channel is.

Source: TIFF 6.0; Adobe, Digital Negative Specification 1.7. NEF, ARW and PEF are told by what they have in common.
"""

from __future__ import annotations

import struct
from pathlib import Path

_SUBFILE_TYPE, _PHOTOMETRIC, _SUB_IFDS, _EXTRA_SAMPLES, _DNG_VERSION = 254, 262, 330, 338, 50706
_REDUCED = 1  # bit of the subfile type: a smaller version of another image in the file
_OF_SENSORS = {32803, 34892}  # photometric interpretations: colour filter array, linear raw
_UNSPECIFIED = 0  # extra sample that is no alpha
_SHORT = 3


def is_raw(path: Path) -> bool:
    """Tell whether a file that begins as a TIFF holds a picture that needs developing.

    Its first image is then a preview, or what its sensor saw: not the photograph.
    """
    with path.open("rb") as file:
        if file.read(12)[8:] == b"CR\2\0":  # Canon's CR2
            return True
    tags = _tags(path)
    return (
        _DNG_VERSION in tags
        or tags.get(_PHOTOMETRIC) in _OF_SENSORS
        or (_SUB_IFDS in tags and bool(tags.get(_SUBFILE_TYPE, 0) & _REDUCED))
    )


def has_selection(path: Path) -> bool:
    """Tell whether the one channel besides the colours is a saved selection or a spot colour: no transparency."""
    return _tags(path).get(_EXTRA_SAMPLES) == _UNSPECIFIED


def _tags(path: Path) -> dict[int, int]:
    """Return the first image's tags, each with its first value, or the offset of its values."""
    with path.open("rb") as file:
        head = file.read(8)
        order = "<" if head.startswith(b"II") else ">"
        try:
            file.seek(*struct.unpack_from(order + "I", head, 4))
            (count,) = struct.unpack(order + "H", file.read(2))
        except struct.error:
            return {}
        directory = file.read(12 * count)
    tags = {}
    for at in range(0, len(directory) - 11, 12):
        tag, kind, _ = struct.unpack_from(order + "HHI", directory, at)
        (tags[tag],) = struct.unpack_from(order + ("H" if kind == _SHORT else "I"), directory, at + 8)
    return tags
