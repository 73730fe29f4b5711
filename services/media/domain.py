"""What can be done to an image, what an image may be, and why work is refused. No I/O, no protobuf.

Each operation is one dataclass with the name and the fields of its message in the contract; what its
fields mean and may hold is said there, once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from mesh.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, MeshError, Unavailable

# One worker's budget of time and memory; a full-frame camera makes 60 megapixels. Of an animation all frames together.
MAX_PIXELS = 100_000_000
MAX_FRAMES = 500  # of an animation or a multi-page file; finding them costs time even where only the first is used
MAX_SIDE_PX = 16_384  # as the contract's bounds of width and height
MAX_WEBP_SIDE_PX = 16_383  # 14 bits in its header
MAX_NAME_LENGTH = 255  # of a stored file
MAX_RESULTS = 16  # of one task, as the contract's bounds of CompleteTask

WHITE = "#ffffff"
FULL_DISK = ("No space left on device", "Disk quota exceeded")  # ENOSPC and EDQUOT, in the words of the C library


class InputUnsupported(InvalidArgument):
    reason = "INPUT_UNSUPPORTED"


class InputDamaged(InvalidArgument):
    reason = "INPUT_DAMAGED"


class ImageTooLarge(InvalidArgument):
    reason = "IMAGE_TOO_LARGE"


class OutputTooLarge(InvalidArgument):
    reason = "OUTPUT_TOO_LARGE"


class TargetUnreachable(FailedPrecondition):
    reason = "TARGET_UNREACHABLE"


class AlreadySmallest(FailedPrecondition):
    reason = "ALREADY_SMALLEST"


class TextEmpty(InvalidArgument):
    reason = "TEXT_EMPTY"


class OperationUnknown(Unavailable):  # to this worker: while an installation is upgraded another one may know it
    reason = "OPERATION_UNKNOWN"


class ModelMissing(Unavailable):  # from this worker: another one may have the weights
    reason = "MODEL_MISSING"


class ModelUnusable(Unavailable):  # on this worker: its file is not what the manifest says, or does not load
    reason = "MODEL_UNUSABLE"


class TimeLimitExceeded(DeadlineExceeded):
    reason = "TIME_LIMIT_EXCEEDED"


class OutOfMemory(Unavailable):
    reason = "OUT_OF_MEMORY"


class WorkerCrashed(Unavailable):
    reason = "WORKER_CRASHED"


class StorageUnavailable(Unavailable):
    reason = "STORAGE_UNAVAILABLE"


class NoRoom(Unavailable):
    reason = "STORAGE_FULL"


class Format(Enum):
    """File formats that can be written, by file name extension."""

    JPEG = "jpg"
    PNG = "png"
    WEBP = "webp"
    AVIF = "avif"
    GIF = "gif"
    PDF = "pdf"

    @property
    def content_type(self) -> str:
        return "application/pdf" if self is Format.PDF else f"image/{self.name.lower()}"

    @property
    def holds_frames(self) -> bool:
        return self in (Format.GIF, Format.WEBP)

    @property
    def is_opaque(self) -> bool:
        return self in (Format.JPEG, Format.PDF)

    @property
    def max_side_px(self) -> int:
        return MAX_WEBP_SIDE_PX if self is Format.WEBP else MAX_SIDE_PX


class Fit(Enum):
    FIT = "fit"
    FILL = "fill"
    INSIDE = "inside"


class Interest(Enum):
    ATTENTION = "attention"
    ENTROPY = "entropy"
    FACES = "faces"


class Gravity(Enum):
    """Where on the image: share of the free width on the left, of the free height above."""

    CENTRE = (0.5, 0.5)
    NORTH = (0.5, 0.0)
    NORTH_EAST = (1.0, 0.0)
    EAST = (1.0, 0.5)
    SOUTH_EAST = (1.0, 1.0)
    SOUTH = (0.5, 1.0)
    SOUTH_WEST = (0.0, 1.0)
    WEST = (0.0, 0.5)
    NORTH_WEST = (0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a task may ask for."""

    VERSION: ClassVar[int] = 2
    """Goes up with every change to what comes out, so that results of before are not taken for those of now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation(Work):
    """What turns an image into another; without a format most results have the input's, or are PNGs."""

    format: Format | None = None
    quality: int = 80
    still: bool = False
    """Of an animation the first frame only, whatever the format: for renders; a task cannot ask for it."""

    @property
    def is_transparent(self) -> bool:
        """Whether the result is transparent in places, whatever the input was."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Resize(Operation):
    width: int | None = None
    height: int | None = None
    fit: Fit = Fit.INSIDE


@dataclass(frozen=True, slots=True, kw_only=True)
class SmartCrop(Operation):
    width: int
    height: int
    interest: Interest = Interest.ATTENTION


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    content: str
    size_px: int | None = None
    colour: str = WHITE
    font: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    file_id: str
    scale: float = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Watermark(Operation):
    text: Text | None = None
    image: Image | None = None
    gravity: Gravity = Gravity.SOUTH_EAST
    opacity: float = 0.5
    margin_px: int = 16
    tiled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Convert(Work):
    format: Format | None = None
    quality: int = 80
    background: str = WHITE


@dataclass(frozen=True, slots=True, kw_only=True)
class Compress(Work):
    max_bytes: int
    format: Format | None = None
    min_quality: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimise(Work):
    min_ssim: float = 0.98
    format: Format | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumbnails(Work):
    sizes: tuple[Resize, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Defocus:
    radius: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Backdrop:
    file_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveBackground(Operation):
    colour: str = ""
    blur: Defocus | None = None
    image: Backdrop | None = None

    @property
    def is_transparent(self) -> bool:
        return not (self.colour or self.blur or self.image)


@dataclass(frozen=True, slots=True, kw_only=True)
class Upscale(Operation):
    factor: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One of a pipeline's; exactly one is set."""

    resize: Resize | None = None
    smart_crop: SmartCrop | None = None
    watermark: Watermark | None = None
    remove_background: RemoveBackground | None = None
    upscale: Upscale | None = None

    @property
    def operation(self) -> Operation:
        for field in fields(self):
            found: Operation | None = getattr(self, field.name)
            if found is not None:
                return found
        raise OperationUnknown("The worker does not know a step of the pipeline: it is older than the task.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline(Work):
    """`convert`, `compress`, `optimise` and `thumbnails` are its end: one of them at most is set."""

    steps: tuple[Step, ...]
    convert: Convert | None = None
    compress: Compress | None = None
    optimise: Optimise | None = None
    thumbnails: Thumbnails | None = None

    @property
    def end(self) -> Work:
        return self.convert or self.compress or self.optimise or self.thumbnails or Convert()


# Found by their base.
OPERATIONS: tuple[type[Work], ...] = tuple(
    kind
    for kind in list(globals().values())
    if isinstance(kind, type) and issubclass(kind, Work) and kind not in (Work, Operation)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Weights and what must be known to use them; an entry of a manifest.

    A model takes and gives float32 of shape (items, channels, rows, columns). In: RGB of `side_px` a side, 0..1 less
    `mean` over `std`. Out: for `remove_background` one channel, how much each pixel is foreground; for `upscale` RGB,
    0..1, `scale` times as wide and high.
    """

    name: str
    version: str
    operation: str
    """The field of the contract's Operation that it serves; the first of several is used."""
    file: str
    sha256: str
    licence: str
    source: str
    item_bytes: int
    """What one item more in a batch takes of memory; measured."""
    side_px: int
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    scale: int = 1
    margin_px: int = 0
    """Pixels at the edges of what comes out that are not to be used, before scaling: they lack their surroundings."""


Job = tuple[Work, Path, dict[str, Path], Path]
"""What a child process is given: operation, input, other files by id, folder of the results."""


@dataclass(frozen=True, slots=True)
class Written:
    """A result on disk; sides in pixels."""

    path: Path
    format: Format
    width: int
    height: int


def resized(width: int, height: int, operation: Resize) -> tuple[int, int]:
    """Return the sides that a resize gives an image.

    Args:
        width: the image's own, pixels, > 0.
        height: the image's own, pixels, > 0.
        operation: has a width, a height or both.

    Returns:
        (width, height), pixels, each at least 1.

    Raises:
        OutputTooLarge: the image would be enlarged beyond the bound, as a thin one is that gets wider.
    """
    if operation.fit is Fit.FILL and operation.width and operation.height:
        return operation.width, operation.height
    scale = min(
        wanted / present
        for wanted, present in ((operation.width, width), (operation.height, height))
        if wanted is not None
    )
    if operation.fit is Fit.INSIDE:
        scale = min(scale, 1.0)
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    if scale > 1:
        require_writable(width, height)
    return width, height


def require_writable(width: int, height: int) -> None:
    """Raise OutputTooLarge if a side, pixels, is longer than any format may have it."""
    if max(width, height) > MAX_SIDE_PX:
        raise OutputTooLarge(
            f"The result would be {width} × {height} pixels; {MAX_SIDE_PX} a side are the most.",
            metadata={"width": str(width), "height": str(height), "max": str(MAX_SIDE_PX)},
        )


@dataclass(frozen=True, slots=True)
class Box:
    """A part of an image, pixels."""

    left: int
    top: int
    width: int
    height: int

    def joined(self, other: Box) -> Box:
        """Return the smallest box that holds both."""
        left, top = min(self.left, other.left), min(self.top, other.top)
        right = max(self.left + self.width, other.left + other.width)
        bottom = max(self.top + self.height, other.top + other.height)
        return Box(left, top, right - left, bottom - top)


def covering(width: int, height: int, box_width: int, box_height: int) -> tuple[int, int]:
    """Return the smallest sides of an image's ratio that leave nothing of a box empty; all in pixels, > 0."""
    scale = max(box_width / width, box_height / height)
    return max(box_width, round(width * scale)), max(box_height, round(height * scale))


def placed_around(boxes: Sequence[Box], width: int, height: int, cut_width: int, cut_height: int) -> tuple[int, int]:
    """Return the top left corner of a cut that keeps as many boxes as fit, those that come first before others.

    Args:
        boxes: what should be kept; at least one.
        width: the image's, pixels.
        height: the image's, pixels.
        cut_width: the cut's, pixels, at most `width`.
        cut_height: the cut's, pixels, at most `height`.

    Returns:
        (x, y), pixels.
    """
    kept = boxes[0]
    for box in boxes[1:]:
        both = kept.joined(box)
        if both.width <= cut_width and both.height <= cut_height:
            kept = both
    x = kept.left + kept.width // 2 - cut_width // 2
    y = kept.top + kept.height // 2 - cut_height // 2
    return min(max(0, x), width - cut_width), min(max(0, y), height - cut_height)


def placed(free_width: int, free_height: int, margin_px: int, gravity: Gravity) -> tuple[int, int]:
    """Return where a mark's top left corner goes.

    Args:
        free_width: the image's width less the mark's, pixels, >= 0.
        free_height: the image's height less the mark's, pixels, >= 0.
        margin_px: distance from the edges, pixels; gives way where there is no room for it.
        gravity: towards where.

    Returns:
        (x, y), pixels.
    """
    across, down = gravity.value
    x_margin, y_margin = min(margin_px, free_width // 2), min(margin_px, free_height // 2)
    return (
        x_margin + round(across * (free_width - 2 * x_margin)),
        y_margin + round(down * (free_height - 2 * y_margin)),
    )


def result_path(folder: Path, index: int, format_: Format) -> Path:
    """Return where an operation puts its result number `index`, from 0."""
    return folder / f"result-{index}.{format_.value}"


@contextmanager
def full_disks_told() -> Iterator[None]:
    """Raise NoRoom where a disk, or an account on it, has no room: libvips has only words for it."""
    try:
        yield
    except MeshError:
        raise
    except Exception as fault:
        if not any(said in str(fault) for said in FULL_DISK):
            raise
        raise NoRoom("There is no room to work in at present; try again later.", retry_after_seconds=60) from fault


def name_ending(written: Written) -> str:
    """Return what a result's name has after its input's, e.g. `-800x533.webp`."""
    return f"-{written.width}x{written.height}.{written.format.value}"


def result_name(input_name: str, written: Written) -> str:
    """Return the file name of a result, e.g. `photo-800x533.webp`."""
    stem = input_name.rpartition(".")[0] or input_name
    ending = name_ending(written)
    return stem[: MAX_NAME_LENGTH - len(ending)] + ending


def canonical(operation: Work, contents: Mapping[str, str]) -> str:
    """Return all that an operation says, its defaults included, in the one way for all that say the same.

    Args:
        operation: whatever it leaves out stands in it as its default.
        contents: what stands for the file of each id, since equal work may name other files of equal content.
    """
    return json.dumps(_plain(operation, contents), sort_keys=True, separators=(",", ":"))


def resources_used(canonical_operation: str, models: Iterable[Model], face_detector: str, fonts: str) -> str:
    """Return what the work in `canonical(operation)` takes of what differs between workers and shows in its results.

    Its models by name, version and weights, what finds faces, and the fonts; not what computes the models (ONNX
    Runtime's version, a CUDA device): by another one a result differs in its last bits and is as right.

    Args:
        canonical_operation: may name several.
        models: those that are there.
        face_detector: what finds faces here, empty for nothing: then the same operation gives something else.
        fonts: what texts are drawn with here.
    """
    used = [each for each in models if f'"operation":"{_camel(each.operation)}"' in canonical_operation]
    names = [f"{each.name} {each.version} {each.sha256[:16]}" for each in used]
    if face_detector and f'"interest":"{Interest.FACES.name}"' in canonical_operation:
        names.append(face_detector)
    if '"text":{' in canonical_operation:
        names.append(fonts)
    return ", ".join(names)


def work_key(*parts: str) -> str:
    """Return the name of some work: equal for equal `parts`, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _camel(name: str) -> str:
    """Return how the contract's JSON calls an operation, from its field's or its message's name."""
    first, *more = name.split("_")
    return first[0].lower() + first[1:] + "".join(each.capitalize() for each in more)


def _plain(value: Any, contents: Mapping[str, str]) -> Any:
    if is_dataclass(value):
        said = {
            field.name: contents[found] if field.name == "file_id" else _plain(found, contents)
            for field in fields(value)
            if (found := getattr(value, field.name)) is not None
        }
        if isinstance(value, Work):
            said |= {"operation": _camel(type(value).__name__), "version": value.VERSION}
        return said
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [_plain(each, contents) for each in value]
    return value
