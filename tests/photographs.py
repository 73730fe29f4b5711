"""Real photographs, from a package that ships them (scikit-image, whose code is never imported)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pyvips


def photograph(name: str = "rocket.jpg") -> Path:
    """Return the path of a photograph; `rocket.jpg` is a JPEG of 640 x 427 pixels."""
    spec = find_spec("skimage")
    assert spec, "scikit-image is not installed: run the tests by scripts/test"
    (folder,) = spec.submodule_search_locations or ()
    return Path(folder) / "data" / name


def twelve_megapixels(path: Path) -> Path:
    """Write a JPEG of 4,000 x 3,000 pixels: a person, enlarged, with the grain that a camera's sensor adds."""
    person = pyvips.Image.new_from_file(str(photograph("astronaut.png")))[:3]
    large = person.resize(4000 / person.width, vscale=3000 / person.height, kernel="lanczos3")
    grain = pyvips.Image.gaussnoise(4000, 3000, sigma=4, mean=0, seed=1)
    (large + grain).cast("uchar").copy(interpretation="srgb").write_to_file(str(path), Q=90)
    return path
