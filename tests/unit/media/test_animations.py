from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import pyvips
from PIL import Image

from services.media.domain import (
    Compress,
    Convert,
    Fit,
    Format,
    Gravity,
    ImageTooLarge,
    InputDamaged,
    Optimise,
    OutputTooLarge,
    Pipeline,
    Resize,
    SmartCrop,
    Step,
    Text,
    Thumbnails,
    Watermark,
)
from services.media.domain import Image as Mark
from services.media.operations.image import Source
from tests.unit.media.conftest import near, opened_and_closed

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]
DELAYS = [50, 100, 150, 200]  # milliseconds; GIF counts in hundredths of a second
LOOP = 3

KEEPING = [
    Resize(width=60),
    Resize(width=50, height=50, fit=Fit.FILL),
    SmartCrop(width=40, height=60),
    Watermark(text=Text(content="©", size_px=12)),
    Convert(),
    Compress(max_bytes=20_000),
    Optimise(),
    Thumbnails(sizes=(Resize(width=30),)),
    Pipeline(steps=(Step(resize=Resize(width=60)), Step(smart_crop=SmartCrop(width=40, height=40)))),
]


@pytest.fixture(params=["gif", "webp"])
def animation(request, tmp_path) -> Path:
    """Four frames of a colour each, with a white sign that moves from frame to frame."""
    frames = [Image.new("RGB", (120, 80), colour) for colour in COLOURS]
    for number, frame in enumerate(frames):
        frame.paste((255, 255, 255), (10 + 20 * number, 10, 30 + 20 * number, 30))
    path = tmp_path / f"animation.{request.param}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=DELAYS, loop=LOOP, lossless=True)
    return path


def seen(result: Image.Image) -> list[tuple[object, int]]:
    """Return the colour and the time, milliseconds, of each frame."""
    found = []
    for number in range(getattr(result, "n_frames", 1)):
        result.seek(number)
        frame = result.convert("RGB")
        found.append((frame.getpixel((4, frame.height // 2)), int(result.info["duration"])))
    return found


def as_it_was(result: Image.Image) -> bool:
    found = seen(result)
    return [time for _, time in found] == DELAYS and all(
        near(colour, wanted, within=30) for (colour, _), wanted in zip(found, COLOURS, strict=True)
    )


@pytest.mark.parametrize("operation", KEEPING, ids=lambda each: type(each).__name__)
def test_frames_their_times_and_the_loop_are_kept(run, animation, operation):
    result, written = run(operation, animation)

    assert as_it_was(result)
    # Counted once more than repeated: GIF says how often it is repeated, WebP how often it is shown.
    assert result.info["loop"] == Image.open(animation).info["loop"] + {
        ("gif", "WEBP"): 1, ("webp", "GIF"): -1
    }.get((animation.suffix[1:], result.format or ""), 0)  # fmt: skip
    assert (written.width, written.height) == result.size


@pytest.mark.parametrize("format_", [Format.GIF, Format.WEBP])
def test_frames_are_kept_from_one_format_to_the_other(run, animation, format_):
    result, _ = run(Convert(format=format_), animation)

    assert (result.format, as_it_was(result)) == (format_.name, True)


@pytest.mark.parametrize("format_", [Format.JPEG, Format.PNG, Format.AVIF])
def test_where_the_format_holds_no_frames_the_first_is_used(run, animation, format_):
    result, _ = run(Resize(width=60, format=format_), animation)

    assert getattr(result, "n_frames", 1) == 1
    assert near(result.convert("RGB").getpixel((2, 20)), COLOURS[0], within=20)


@pytest.mark.parametrize(
    ("numbers", "delay", "size"),
    [
        ("001122334455", 40, (120, 80)),
        ("011111223333", 0, (120, 80)),
        ("000000", 40, (120, 80)),
        ("000000011111", 40, (300, 300)),  # a sample of its frames decides
    ],
)
def test_frames_that_webp_joins_are_compared_by_their_times(run, coffee, tmp_path, numbers, delay, size):
    scene = Image.open(coffee).resize(size)
    frames = [scene.copy() for _ in numbers]
    for frame, number in zip(frames, map(int, numbers), strict=True):
        frame.paste((200, 30, 30), (10 + 15 * number, 10, 30 + 15 * number, 30))
    roll = pyvips.Image.arrayjoin(
        [pyvips.Image.new_from_array(frame, interpretation="srgb") for frame in frames], across=1
    )
    roll = roll.copy()
    roll.set_type(pyvips.GValue.gint_type, "page-height", scene.height)
    roll.set_type(pyvips.GValue.array_int_type, "delay", [delay] * len(frames))
    roll.gifsave(str(tmp_path / "recording.gif"), keep_duplicate_frames=True)

    result, written = run(Optimise(), tmp_path / "recording.gif")
    _, asked_for = run(Optimise(format=Format.WEBP), tmp_path / "recording.gif")

    assert (written.format, asked_for.format) == (Format.WEBP, Format.WEBP)
    assert getattr(result, "n_frames", 1) == len(set(numbers))


@pytest.mark.parametrize(
    "operation", [Convert(), Resize(width=60, format=Format.GIF), Optimise()], ids=lambda each: type(each).__name__
)
def test_of_an_animated_avif_the_first_frame_is_used(run, tmp_path, operation):
    first, *others = [Image.new("RGB", (120, 80), colour) for colour in COLOURS]
    first.save(tmp_path / "animation.avif", save_all=True, append_images=others, duration=100)
    assert (tmp_path / "animation.avif").read_bytes()[4:12] == b"ftypavis"

    result, _ = run(operation, tmp_path / "animation.avif")

    assert getattr(result, "n_frames", 1) == 1
    assert near(result.convert("RGB").getpixel((2, 20)), COLOURS[0], within=20)


# How an upright picture is stored for each orientation (EXIF 2.32, 4.6.5.1.6).
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("format_", [Format.GIF, Format.WEBP])
@pytest.mark.parametrize("orientation", STORED)
def test_every_frame_is_upright(run, tmp_path, orientation, format_):
    frames = [Image.new("RGB", (120, 80), colour) for colour in COLOURS]
    for frame in frames:
        frame.paste((255, 255, 255), (0, 0, 40, 20))
    stored = [frame if (how := STORED[orientation]) is None else frame.transpose(how) for frame in frames]
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = tmp_path / "turned.webp"
    stored[0].save(turned, save_all=True, append_images=stored[1:], duration=DELAYS, lossless=True, exif=exif.tobytes())

    result, written = run(Convert(format=format_), turned)

    assert result.size == (written.width, written.height) == (120, 80)
    assert as_it_was(result)
    assert 0x0112 not in result.getexif()
    for number in range(len(COLOURS)):
        result.seek(number)
        shown = result.convert("RGB")
        assert near(shown.getpixel((20, 10)), (255, 255, 255), within=30)
        assert not near(shown.getpixel((100, 10)), (255, 255, 255), within=30)
        assert not near(shown.getpixel((20, 70)), (255, 255, 255), within=30)


def test_of_sizes_with_frames_and_without_each_is_as_large_as_told(run_all, animation):
    sizes = (Resize(width=60, format=Format.JPEG), Resize(width=60, format=Format.GIF))

    still, moving = run_all(Thumbnails(sizes=sizes), animation)

    for image, written in (still, moving):
        assert (written.width, written.height) == image.size == (60, 40)


def test_an_operation_that_makes_new_images_keeps_times_and_loop(animation):
    frames = Source(animation).frames(animated=True).each(lambda picture: pyvips.Image.black(picture.width, 9, bands=3))

    roll = frames.pixels(Format.GIF)

    assert (roll.width, roll.height, roll.get("page-height")) == (120, 36, 9)
    assert (roll.get("delay"), roll.get("loop")) == (DELAYS, frames.loop)


def test_a_crop_is_the_same_in_every_frame(run, tmp_path):
    frames = [Image.new("RGB", (300, 60), (128, 128, 128)) for _ in range(4)]
    for number, frame in enumerate(frames):
        frame.paste((220, 40, 30), (240 - 70 * number, 20, 260 - 70 * number, 40))  # what draws the eye moves away
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], duration=100, lossless=True)

    # WebP joins frames that are alike.
    result, _ = run(SmartCrop(width=60, height=60, format=Format.GIF), tmp_path / "moving.webp")

    shown = []
    for number in range(4):
        result.seek(number)
        shown.append(any(near(result.convert("RGB").getpixel((x, 30)), (220, 40, 30), within=40) for x in range(60)))
    assert shown == [True, False, False, False]


def test_a_mark_is_decoded_once_for_all_frames(run, animation, tmp_path):
    Image.new("RGB", (30, 30), (0, 255, 255)).save(tmp_path / "mark.png")
    work = Watermark(image=Mark(file_id="m", scale=0.25), gravity=Gravity.CENTRE, opacity=1)
    marks = {"m": tmp_path / "mark.png"}

    for_four = opened_and_closed(marks["m"], lambda: run(work, animation, marks))
    for_one = opened_and_closed(marks["m"], lambda: run(replace(work, format=Format.PNG), animation, marks))
    result, _ = run(work, animation, marks)

    assert for_four == for_one
    for number in range(4):
        result.seek(number)
        assert near(result.convert("RGB").getpixel((60, 40)), (0, 255, 255), within=30)


def test_transparent_frames_stay_transparent(run, tmp_path):
    frames = [Image.new("RGBA", (40, 40), (0, 0, 0, 0)) for _ in range(3)]
    for number, frame in enumerate(frames):
        frame.paste((255, 0, 0, 255), (10 * number, 0, 10 * number + 10, 40))
    frames[0].save(tmp_path / "clear.webp", save_all=True, append_images=frames[1:], duration=100, lossless=True)

    result, _ = run(Resize(width=20, format=Format.GIF), tmp_path / "clear.webp")

    result.seek(2)
    assert [result.convert("RGBA").getpixel((x, 10))[3] for x in (2, 12, 17)] == [0, 255, 0]


def test_frames_that_are_too_much_together_are_refused(run, tmp_path):
    frames = [Image.new("L", (2000, 2000), 250 * (number % 2)) for number in range(26)]
    frames[0].save(tmp_path / "large.gif", save_all=True, append_images=frames[1:], duration=20)

    with pytest.raises(ImageTooLarge) as refusal:
        run(Resize(width=20), tmp_path / "large.gif")
    first, _ = run(Resize(width=20, format=Format.PNG), tmp_path / "large.gif")

    assert refusal.value.metadata["frames"] == "26"
    assert first.size == (20, 20)


def test_a_result_that_is_too_much_together_is_refused(run, animation):
    with pytest.raises(OutputTooLarge) as refusal:
        run(Resize(width=10_000, fit=Fit.FIT), animation)

    assert refusal.value.metadata["frames"] == "4"


def test_an_animation_that_is_cut_off_is_damaged_or_has_the_frames_that_are_there(run, animation, tmp_path):
    whole = animation.read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) * 2 // 3])

    if animation.suffix == ".webp":  # its header says how many bytes there are
        with pytest.raises(InputDamaged):
            run(Resize(width=20), tmp_path / "cut")
    else:
        result, _ = run(Resize(width=20), tmp_path / "cut")
        shown = [colour for colour, _ in seen(result)]
        assert all(near(colour, wanted, within=30) for colour, wanted in zip(shown[:-1], COLOURS, strict=False))
