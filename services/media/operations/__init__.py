"""What a media worker can do. One file an operation, by its name; `image` is what they share.

An operation's file has one of two functions. `run` makes an image from a picture, and may be a step of a pipeline.
`write` makes the results of what came before, and may be a pipeline's end; `formats` says in what it may write them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pyvips

from services.media import domain
from services.media.operations import image


def _named(function: str) -> dict[type[domain.Work], Callable[..., Any]]:
    """Return the function of this name of every operation that has it; SmartCrop is in `smart_crop.py`."""
    files = {kind: re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower() for kind in domain.OPERATIONS}
    modules = {kind: import_module(f"{__name__}.{file}") for kind, file in files.items() if kind is not domain.Pipeline}
    return {kind: getattr(module, function) for kind, module in modules.items() if hasattr(module, function)}


RUN: Mapping[type[domain.Work], Callable[[image.Picture, Any, Mapping[str, image.Source]], pyvips.Image]]
RUN = _named("run")
FORMATS: Mapping[type[domain.Work], Callable[[Any, image.Source], Sequence[domain.Format]]]
FORMATS = _named("formats")
WRITE: Mapping[
    type[domain.Work],
    Callable[[image.Frames, Any, image.Source, image.Place, image.Progress], Sequence[domain.Written]],
]
WRITE = _named("write")


# How libvips, libtiff and most of libaom say it; libjpeg and libpng; libwebp; what it is of a thread; and libwebp and
# libaom where they do not say it, of pixels that are ours and within their bounds.
_NO_MEMORY = (
    "out of memory", "allocat", "insufficient memory", "picture memory error", "creating thread",
    "webpsave: unable to encode", "encoder plugin generated an error",
)  # fmt: skip


def is_out_of_memory(said: str) -> bool:
    """Tell whether libvips or one of its codecs speaks of a lack of memory.

    Of a TIFF's empty directory libtiff does too, and libheif of sides that no image has.
    """
    is_of_the_file = any(sign in said for sign in ("(0 elements", "security limit"))
    return not is_of_the_file and any(sign in said for sign in _NO_MEMORY)


def run(
    work: domain.Work, source: Path, files: Mapping[str, Path], folder: Path, progress: image.Progress
) -> Sequence[domain.Written]:
    """Do an operation: files to files, in this thread.

    Args:
        work: what to do.
        source: the input.
        files: what else the operation names, by file id.
        folder: where the results go, as `domain.result_path` names them.
        progress: is told how far it is, often.

    Raises:
        InputUnsupported: not an image of a kind that is taken.
        InputDamaged: the pixels cannot be decoded.
        ImageTooLarge: more than the bounds.
        OutputTooLarge: the result would be more than the bounds.
        TargetUnreachable: not in so few bytes.
        AlreadySmallest: not in fewer bytes than the input.
        TextEmpty: a watermark without anything to see.
        OutOfMemory: more was needed than this process may have.
        ModelMissing: no weights for it are there.
        ModelUnusable: the weights are there, and something is wrong with them.
        WorkerCrashed: the process that has the model died.
        NoRoom: the disk is full.
    """
    opened = image.Source(source)
    others = {file_id: image.Source(path) for file_id, path in files.items()}
    steps, end = _parts(work)
    if opened.format.is_opaque and any(step.is_transparent for step in steps):
        opened.format = domain.Format.PNG
    try:
        with domain.full_disks_told():
            formats = FORMATS[type(end)](end, opened)
            still = any(step.still for step in steps)
            frames = opened.frames(animated=not still and any(format_.holds_frames for format_ in formats))
            for step in steps:
                frames = frames.each(partial(_done, step, others))
            return WRITE[type(end)](frames, end, opened, partial(domain.result_path, folder), progress)
    except pyvips.Error as fault:
        if is_out_of_memory(str(fault).lower()):
            raise domain.OutOfMemory("The image needs more memory than a worker has.") from fault
        for each in (opened, *others.values()):
            each.require_decodable()  # libvips does not say whose fault it was
        raise


def _parts(work: domain.Work) -> tuple[Sequence[domain.Operation], domain.Work]:
    """Return the steps of some work, and how its results are written."""
    if isinstance(work, domain.Pipeline):
        return [step.operation for step in work.steps], work.end
    if isinstance(work, domain.Operation):
        return [work], domain.Convert(format=work.format, quality=work.quality)
    return [], work


def _done(step: domain.Operation, files: Mapping[str, image.Source], picture: image.Picture) -> pyvips.Image:
    return RUN[type(step)](picture, step, files)
