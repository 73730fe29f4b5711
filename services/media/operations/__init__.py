"""What a media worker can do. One file an operation; `image` is what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyvips

from services.media import domain
from services.media.operations import convert, image, resize, smart_crop, watermark

# An operation is its dataclass and this: (input, parameters, other input files by id) to the resulting image.
RUN: Mapping[type[domain.Operation], Callable[[image.Source, Any, Mapping[str, image.Source]], pyvips.Image]] = {
    domain.Resize: resize.run,
    domain.Convert: convert.run,
    domain.SmartCrop: smart_crop.run,
    domain.Watermark: watermark.run,
}


_NO_MEMORY = ("out of memory", "allocat")  # as libvips and its codecs put it


def run(
    operation: domain.Operation, source: Path, files: Mapping[str, Path], folder: Path, progress: image.Progress
) -> Sequence[domain.Written]:
    """Do an operation: files to files, in this thread.

    Args:
        operation: what to do.
        source: the input.
        files: what else the operation names, by file id.
        folder: where the results go, as `domain.result_path` names them.
        progress: is told how far it is, often.

    Raises:
        InputUnsupported: not an image of a kind that is taken.
        InputDamaged: the pixels cannot be decoded.
        ImageTooLarge: more than the bounds.
        OutputTooLarge: the result would be more than the bounds.
        TextEmpty: a watermark without anything to see.
        OutOfMemory: more was needed than this process may have.
    """
    opened = image.Source(source)
    others = {file_id: image.Source(path) for file_id, path in files.items()}
    format_ = operation.format or opened.format
    try:
        made = RUN[type(operation)](opened, operation, others)
        return [image.write(made, format_, operation.quality, domain.result_path(folder, 0, format_), progress)]
    except pyvips.Error as fault:
        if any(sign in str(fault).lower() for sign in _NO_MEMORY):
            raise domain.OutOfMemory("The image needs more memory than a worker has.") from fault
        for path in (source, *files.values()):
            image.require_decodable(path)  # libvips does not say whose fault it was
        raise
