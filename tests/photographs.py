"""Real photographs, from a package that ships them (scikit-image, whose code is never imported)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def photograph(name: str = "rocket.jpg") -> Path:
    """Return the path of a photograph; `rocket.jpg` is a JPEG of 640 x 427 pixels."""
    spec = find_spec("skimage")
    assert spec, "scikit-image is not installed: run the tests by scripts/test"
    (folder,) = spec.submodule_search_locations or ()
    return Path(folder) / "data" / name
