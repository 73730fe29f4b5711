"""Pillow as a user of it would call it on many files: `pillow_peer PROCESSES`.

Each line on standard input is a folder and what to do, `resize` or `convert`: it is done to the folder's JPEGs, and a
line of JSON tells how long that took.
"""

import json
import multiprocessing
import sys
import time
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps


def done(work: str, path: Path) -> None:
    with Image.open(path) as image:
        if work == "resize":
            image.draft("RGB", (1024, 1024))  # the decoder shrinks what it can
            upright = ImageOps.exif_transpose(image)
            upright.thumbnail((1024, 1024), Image.Resampling.LANCZOS)
            upright.save(path.with_suffix(".out"), "JPEG", quality=80, optimize=True)
        else:
            ImageOps.exif_transpose(image).save(path.with_suffix(".out"), "WEBP", quality=80)


def main() -> None:
    with multiprocessing.get_context("spawn").Pool(int(sys.argv[1])) as pool:
        for line in sys.stdin:
            folder, work = line.split()
            paths = list(Path(folder).glob("*.jpg"))
            began = time.perf_counter()
            pool.map(partial(done, work), paths, chunksize=1)
            print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
