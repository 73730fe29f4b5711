from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import pyvips
from PIL import Image, ImageChops, ImageCms

from services.media import operations
from services.media.domain import (
    Convert,
    Fit,
    Format,
    Gravity,
    ImageTooLarge,
    Interest,
    OutputTooLarge,
    Pipeline,
    Resize,
    SmartCrop,
    Step,
    Text,
    TextEmpty,
    Thumbnails,
    Watermark,
)
from services.media.domain import Image as Mark
from tests.unit.media.conftest import near


def test_resize_inside_keeps_the_ratio_and_the_format(run, rocket):
    result, written = run(Resize(width=320), rocket)

    assert (result.size, result.format) == ((320, 214), "JPEG")
    assert (written.width, written.height) == (320, 214)
    assert near(result.getpixel((160, 100)), Image.open(rocket).resize((320, 214)).getpixel((160, 100)))


def test_resize_inside_never_enlarges(run, rocket):
    result, _ = run(Resize(width=5000, height=5000), rocket)

    assert result.size == (640, 427)


def test_resize_fit_enlarges_into_the_box(run, rocket):
    result, _ = run(Resize(width=1280, height=5000, fit=Fit.FIT), rocket)

    assert result.size == (1280, 854)


@pytest.mark.parametrize("size", [(200, 200), (1000, 100), (1000, 1000), (1, 1)])
def test_resize_fill_gives_exactly_the_box(run, rocket, size):
    result, _ = run(Resize(width=size[0], height=size[1], fit=Fit.FILL), rocket)

    assert result.size == size


@pytest.mark.parametrize("size", [(200, 200), (50, 50)], ids=["enlarged", "shrunk"])
def test_resize_fill_keeps_the_middle(run, tmp_path, size):
    scene = Image.new("RGB", (300, 100), (0, 200, 0))
    scene.paste((200, 0, 0), (0, 0, 100, 100))
    scene.paste((0, 0, 200), (200, 0, 300, 100))
    scene.save(tmp_path / "scene.png")

    result, _ = run(Resize(width=size[0], height=size[1], fit=Fit.FILL), tmp_path / "scene.png")

    middle = result.getpixel((size[0] // 2, size[1] // 2))
    assert near(middle, (0, 200, 0), within=1)
    for across in (size[0] // 20, size[0] - 1 - size[0] // 20):
        assert near(result.getpixel((across, 5)), middle, within=1)


@pytest.mark.parametrize(
    "operation",
    [
        Resize(width=1000, height=1000, fit=Fit.FILL),
        SmartCrop(width=1000, height=1000),
        SmartCrop(width=1000, height=1000, interest=Interest.ENTROPY),
        SmartCrop(width=1000, height=1000, interest=Interest.FACES),
        Thumbnails(sizes=(Resize(width=1000, height=1000, fit=Fit.FILL),)),
    ],
    ids=lambda each: type(each).__name__,
)
def test_the_thinnest_strip_fills_a_box(run, tmp_path, operation):
    Image.new("RGB", (1, 16_384), (9, 99, 200)).save(tmp_path / "strip.png")

    result, _ = run(operation, tmp_path / "strip.png")

    assert result.size == (1000, 1000)
    assert near(result.getpixel((500, 500)), (9, 99, 200))


def test_resize_by_height_alone(run, coffee):
    result, _ = run(Resize(height=100, format=Format.WEBP), coffee)

    assert (result.size, result.format) == ((150, 100), "WEBP")


def test_a_result_too_long_for_its_format_is_refused(run, tmp_path):
    strip = tmp_path / "strip.png"
    Image.new("RGB", (2000, 10)).save(strip)

    with pytest.raises(OutputTooLarge) as refusal:
        run(Resize(height=2000, fit=Fit.FIT), strip)

    assert refusal.value.metadata["width"] == "400000"


@pytest.mark.parametrize(
    ("size", "width", "refused", "side"),
    [
        ((1, 5000), 16_384, OutputTooLarge, ("height", "81920000")),  # too long
        ((10, 10), 10_001, ImageTooLarge, ("width", "10001")),  # too many pixels
    ],
)
def test_a_step_too_large_is_refused_though_the_next_would_make_it_smaller(run, tmp_path, size, width, refused, side):
    Image.new("RGB", size).save(tmp_path / "input.png")
    steps = (Step(resize=Resize(width=width, fit=Fit.FIT)), Step(resize=Resize(width=10)))

    with pytest.raises(refused) as refusal:
        run(Pipeline(steps=steps), tmp_path / "input.png")

    assert side in refusal.value.metadata.items()


def test_a_panorama_longer_than_a_result_may_be_can_be_made_smaller(run, tmp_path):
    Image.new("RGB", (20_000, 100)).save(tmp_path / "panorama.png")
    steps = (Step(resize=Resize(height=90)), Step(resize=Resize(width=1000)))

    result, _ = run(Pipeline(steps=steps), tmp_path / "panorama.png")

    assert result.size == (1000, 5)


@pytest.mark.parametrize("format_", [each for each in Format if each is not Format.PDF])
def test_convert_writes_every_format(run, coffee, format_):
    result, _ = run(Convert(format=format_), coffee)

    assert (result.size, result.format) == ((600, 400), format_.name)
    assert near(result.convert("RGB").getpixel((300, 200)), Image.open(coffee).getpixel((300, 200)), within=16)


def test_lower_quality_is_smaller(run, coffee, tmp_path):
    run(Convert(format=Format.JPEG, quality=90), coffee)
    large = (tmp_path / "result-0.jpg").stat().st_size
    run(Convert(format=Format.JPEG, quality=30), coffee)

    assert (tmp_path / "result-0.jpg").stat().st_size < large / 2


def test_transparency_is_laid_on_the_background_for_jpeg(run, tmp_path):
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(clear)

    on_blue, _ = run(Convert(format=Format.JPEG, background="#0000ff"), clear)
    on_white, _ = run(Resize(width=20, format=Format.JPEG), clear)

    assert near(on_blue.getpixel((20, 20)), (0, 0, 255))
    assert near(on_white.getpixel((10, 10)), (255, 255, 255))


def test_transparency_stays_where_the_format_has_it(run, tmp_path):
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (40, 40), (255, 0, 0, 100)).save(clear)

    result, _ = run(Convert(format=Format.WEBP), clear)

    assert result.mode == "RGBA"
    assert result.getpixel((20, 20))[3] == 100


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_result_is_upright(run, rocket, tmp_path, orientation):
    upright = Image.open(rocket)
    stored = {
        2: (Image.Transpose.FLIP_LEFT_RIGHT,),
        3: (Image.Transpose.ROTATE_180,),
        4: (Image.Transpose.FLIP_TOP_BOTTOM,),
        5: (Image.Transpose.TRANSPOSE,),
        6: (Image.Transpose.ROTATE_90,),
        7: (Image.Transpose.TRANSVERSE,),
        8: (Image.Transpose.ROTATE_270,),
    }
    turned = upright
    for step in stored.get(orientation, ()):
        turned = turned.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)

    result, _ = run(Resize(width=320), tmp_path / "turned.jpg")

    assert result.size == (320, 214)
    assert 0x0112 not in result.getexif()
    small = upright.resize((320, 214))
    for spot in ((20, 20), (300, 20), (160, 150), (20, 200)):
        assert near(result.getpixel(spot), small.getpixel(spot), within=25)


def test_metadata_is_gone_but_a_small_srgb_profile(run, rocket, tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    Image.open(rocket).save(tmp_path / "private.jpg", exif=exif, comment=b"secret")

    result, _ = run(Convert(format=Format.JPEG), tmp_path / "private.jpg")

    assert not dict(result.getexif())
    assert "comment" not in result.info
    assert len(result.info["icc_profile"]) < 1000


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "P", "LA", "RGBA", "I;16"])
def test_every_way_to_store_colours_becomes_srgb(run, coffee, tmp_path, mode):
    upright = Image.open(coffee)
    if mode == "I;16":
        pyvips.Image.new_from_file(str(coffee)).colourspace("rgb16").write_to_file(str(tmp_path / "stored.tif"))
        path, expected = tmp_path / "stored.tif", upright
    else:
        stored = upright.convert(mode)
        path = tmp_path / ("stored.jpg" if mode == "CMYK" else "stored.png")
        stored.save(path)
        expected = stored.convert("RGB")

    result, _ = run(Convert(format=Format.PNG), path)

    assert result.mode == ("RGBA" if "A" in mode else "RGB")
    # CMYK has no one true meaning without a profile: the two readers differ, but not by much.
    assert near(result.getpixel((300, 200)), expected.getpixel((300, 200)), within=60 if mode == "CMYK" else 3)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_selection_that_was_saved_in_a_tiff_is_no_transparency(run, coffee, tmp_path, mode):
    interpretation = {"L": "b-w", "RGB": "srgb", "CMYK": "cmyk"}[mode]
    opaque = pyvips.Image.new_from_array(np.asarray(Image.open(coffee).convert(mode)), interpretation=interpretation)
    opaque.tiffsave(str(tmp_path / "opaque.tif"))
    opaque.bandjoin(pyvips.Image.xyz(600, 400)[0] > 300).tiffsave(str(tmp_path / "selected.tif"))
    say_that_it_is_no_alpha(tmp_path / "selected.tif")

    expected, _ = run(Resize(width=100, format=Format.PNG), tmp_path / "opaque.tif")
    result, _ = run(Resize(width=100, format=Format.PNG), tmp_path / "selected.tif")

    assert result.mode == "RGB"
    assert result.tobytes() == expected.tobytes()


def say_that_it_is_no_alpha(path: Path) -> None:
    """Write that it is unspecified into a TIFF's ExtraSamples (338)."""
    content = path.read_bytes()
    order = "<" if content.startswith(b"II") else ">"
    head = struct.pack(order + "HHI", 338, 3, 1)
    assert content.count(head) == 1
    at = content.index(head) + len(head)
    path.write_bytes(content[:at] + bytes(4) + content[at + 4 :])


def test_cmyk_of_16_bits_keeps_its_transparency(run, tmp_path):
    inks = [5140, 25700, 12850, 0, 32896]
    image = (pyvips.Image.black(40, 30, bands=5) + inks).cast("ushort")
    image.copy(interpretation="cmyk").tiffsave(str(tmp_path / "inks.tif"))

    result, _ = run(Convert(format=Format.PNG), tmp_path / "inks.tif")

    assert near(result.getpixel((20, 20)), (227, 157, 167), within=3)
    assert result.getpixel((20, 20))[3] == 128


def test_a_wide_profile_is_converted_to_srgb(run, tmp_path):
    flat = pyvips.Image.black(64, 64).new_from_image([200, 60, 60])
    wide = flat.cast("uchar").copy(interpretation="srgb").icc_transform("p3", input_profile="srgb")
    wide.write_to_file(str(tmp_path / "wide.png"))
    assert not near(Image.open(tmp_path / "wide.png").getpixel((5, 5)), (200, 60, 60), within=5)

    result, _ = run(Convert(format=Format.PNG), tmp_path / "wide.png")

    assert near(result.getpixel((5, 5)), (200, 60, 60), within=2)


def test_cmyk_with_its_profile_keeps_its_colours(run, coffee, tmp_path):
    inked = pyvips.Image.new_from_file(str(coffee)).icc_transform("cmyk", input_profile="srgb")
    inked.jpegsave(str(tmp_path / "inked.jpg"), Q=95)
    assert Image.open(tmp_path / "inked.jpg").mode == "CMYK"

    result, _ = run(Convert(format=Format.PNG), tmp_path / "inked.jpg")

    assert result.mode == "RGB"
    assert near(result.getpixel((300, 200)), Image.open(coffee).getpixel((300, 200)))


def test_a_nonsense_profile_is_passed_over(run, rocket, tmp_path):
    Image.open(rocket).save(tmp_path / "odd.jpg", icc_profile=b"nonsense" * 40)

    result, _ = run(Convert(format=Format.PNG), tmp_path / "odd.jpg")

    assert near(result.getpixel((320, 200)), Image.open(rocket).getpixel((320, 200)))


def test_a_profile_that_is_srgb_by_another_name_changes_nothing(run, coffee, tmp_path):
    other = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.open(coffee).save(tmp_path / "named.png", icc_profile=other)

    result, _ = run(Convert(format=Format.PNG), tmp_path / "named.png")

    assert result.tobytes() == Image.open(coffee).convert("RGB").tobytes()


@pytest.mark.parametrize("interest", list(Interest))
def test_smart_crop_gives_exactly_the_size(run, rocket, interest):
    result, _ = run(SmartCrop(width=200, height=300, interest=interest), rocket)

    assert result.size == (200, 300)


def test_smart_crop_keeps_what_stands_out(run, tmp_path):
    scene = Image.new("RGB", (600, 200), (128, 128, 128))
    scene.paste((220, 40, 30), (520, 60, 580, 140))
    scene.save(tmp_path / "scene.png")

    result, _ = run(SmartCrop(width=200, height=200), tmp_path / "scene.png")

    assert any(near(result.getpixel((x, 100)), (220, 40, 30)) for x in range(200))


# Where the face is on the photograph `astronaut.png`, pixels.
FACE = (180, 75, 270, 185)


def test_faces_are_kept_where_attention_would_cut_them(run, photos, tmp_path):
    photograph = Image.open(photos / "astronaut.png").convert("RGB")
    # Upside down below her is what attracts more: the orange suit, twice.
    scene = Image.new("RGB", (512, 1024))
    scene.paste(photograph, (0, 0))
    scene.paste(photograph.crop((0, 256, 512, 512)).resize((512, 512)), (0, 512))
    scene.save(tmp_path / "scene.png")
    face = photograph.crop(FACE)

    kept, _ = run(SmartCrop(width=512, height=256, interest=Interest.FACES), tmp_path / "scene.png")
    cut, _ = run(SmartCrop(width=512, height=256, interest=Interest.ATTENTION), tmp_path / "scene.png")

    assert holds(kept, face)
    assert not holds(cut, face)


def test_all_faces_are_kept_that_fit(run, photos, tmp_path):
    photograph = Image.open(photos / "astronaut.png").convert("RGB").crop((100, 40, 330, 270))
    scene = Image.new("RGB", (1400, 300), (90, 90, 90))
    for left in (700, 1000):
        scene.paste(photograph, (left, 30))
    scene.save(tmp_path / "pair.png")
    face = photograph.crop((80, 35, 170, 145))

    result, _ = run(SmartCrop(width=600, height=300, interest=Interest.FACES), tmp_path / "pair.png")

    left, right = result.crop((0, 0, 300, 300)), result.crop((300, 0, 600, 300))
    assert holds(left, face)
    assert holds(right, face)


def test_without_a_face_attention_decides(run, coffee):
    by_faces, _ = run(SmartCrop(width=100, height=300, interest=Interest.FACES), coffee)
    by_attention, _ = run(SmartCrop(width=100, height=300), coffee)

    assert by_faces.tobytes() == by_attention.tobytes()


def test_without_a_detector_attention_decides(photos, tmp_path):
    """In a process of its own, as on an installation without OpenCV."""
    program = (
        "import sys; sys.modules['cv2'] = None\n"
        "from pathlib import Path\n"
        "from services.media import operations\n"
        "from services.media.domain import Format, Interest, SmartCrop\n"
        "for interest in (Interest.FACES, Interest.ATTENTION):\n"
        "    work = SmartCrop(width=300, height=60, interest=interest, format=Format.PNG)\n"
        "    (written,) = operations.run(work, Path(sys.argv[1]), {}, Path('.'), lambda _: None)\n"
        "    written.path.rename(interest.value)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}

    subprocess.run([sys.executable, "-c", program, photos / "astronaut.png"], cwd=tmp_path, env=environment, check=True)

    assert (tmp_path / "faces").read_bytes() == (tmp_path / "attention").read_bytes()


def holds(image: Image.Image, part: Image.Image) -> bool:
    """Tell whether a part of a photograph is somewhere on an image."""
    found = cv2.matchTemplate(np.asarray(image.convert("RGB")), np.asarray(part), cv2.TM_SQDIFF_NORMED)
    return bool(found.min() < 0.01)


def test_smart_crop_enlarges_a_small_image(run, rocket, tmp_path):
    Image.open(rocket).resize((64, 43)).save(tmp_path / "small.jpg")

    result, _ = run(SmartCrop(width=300, height=300), tmp_path / "small.jpg")

    assert result.size == (300, 300)


def changed_box(before: Image.Image, after: Image.Image) -> tuple[int, int, int, int]:
    box = ImageChops.difference(before.convert("RGB"), after.convert("RGB")).getbbox()
    assert box is not None
    return box


@pytest.mark.parametrize("content", ["© Atelier", "日本語", "שלום", "नमस्ते", "a < b & <c>", "two\nlines"])
def test_a_text_stands_in_its_corner(run, coffee, content):
    result, _ = run(Watermark(text=Text(content=content, size_px=30), opacity=1, margin_px=10), coffee)

    left, top, right, bottom = changed_box(Image.open(coffee), result)
    assert result.size == (600, 400)
    assert 300 < left < right <= 590
    assert 300 < top < bottom <= 390


def test_a_text_has_the_font_that_was_chosen(run, coffee):
    def with_font(font: str) -> bytes:
        result, _ = run(Watermark(text=Text(content="Atelier", size_px=40, font=font), opacity=1), coffee)
        return result.tobytes()

    plain = with_font("")

    assert with_font("Noto Serif") != plain
    assert with_font("Noto Sans") == plain
    assert with_font("No Such Font") == plain


def test_a_font_without_the_letters_leaves_them_to_another(run, coffee):
    shown, _ = run(Watermark(text=Text(content="日本語", size_px=40), opacity=1), coffee)
    chosen, _ = run(Watermark(text=Text(content="日本語", size_px=40, font="Noto Serif"), opacity=1), coffee)

    assert changed_box(Image.open(coffee), chosen) == changed_box(Image.open(coffee), shown)


@pytest.mark.parametrize("mark", ["text", "image"])
def test_a_tiled_mark_is_everywhere(run, coffee, tmp_path, mark):
    Image.new("RGB", (60, 30), (0, 255, 0)).save(tmp_path / "mark.png")
    work = (
        Watermark(text=Text(content="ATELIER", size_px=20), tiled=True, opacity=1, margin_px=20)
        if mark == "text"
        else Watermark(image=Mark(file_id="m", scale=0.1), tiled=True, opacity=1, margin_px=20)
    )

    result, _ = run(work, coffee, {"m": tmp_path / "mark.png"})

    assert result.size == (600, 400)
    before = Image.open(coffee)
    for left, top in [(0, 0), (500, 0), (250, 150), (0, 300), (500, 300)]:
        place = (left, top, left + 100, top + 100)
        left_box = changed_box(before.crop(place), result.crop(place))
        assert left_box != place


def test_a_tile_as_large_as_the_image_is_the_image(run, tmp_path):
    Image.new("RGB", (50, 5)).save(tmp_path / "thin.png")

    result, _ = run(Watermark(text=Text(content="wide words"), tiled=True, margin_px=16000), tmp_path / "thin.png")

    assert result.size == (50, 5)


def test_a_text_has_its_colour(run, tmp_path):
    Image.new("RGB", (200, 100), (255, 255, 255)).save(tmp_path / "white.png")

    result, _ = run(
        Watermark(text=Text(content="███", size_px=40, colour="#ff0000"), gravity=Gravity.CENTRE, opacity=1),
        tmp_path / "white.png",
    )

    assert (255, 0, 0) in set(result.get_flattened_data())


def test_opacity_zero_changes_nothing(run, coffee):
    result, _ = run(Watermark(text=Text(content="unseen"), opacity=0), coffee)

    assert result.tobytes() == Image.open(coffee).convert("RGB").tobytes()


@pytest.fixture
def shown(run, coffee) -> Callable[[str], bytes]:
    """Return what a text looks like."""
    return lambda text: run(Watermark(text=Text(content=text, size_px=40), opacity=1), coffee)[0].tobytes()


# Spelled with: a joiner, a non-joiner, a space that does not break, a wide one, a tab. Of one script each, so that no
# other font comes in.
@pytest.mark.parametrize(
    "content",
    [
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\u0d9a\u0dca\u200d\u0dbb",
        "10\u00a0EUR",
        "\u5c71\u3000\u592a",
        "10\tEUR",
    ],
)
def test_a_text_keeps_the_letters_that_are_not_seen_themselves(shown, content):
    bare = "".join(letter for letter in content if letter.isprintable())

    assert bare != content
    assert shown(content) != shown(bare)


@pytest.mark.parametrize("odd", ["\x00", "\x1b", "\r", "\u2028", "\u2029", "\ufffe", "\ud800"])
def test_a_text_drops_what_is_no_letter(shown, odd):
    assert shown(f"two{odd}\nlines") == shown("two\nlines")


@pytest.mark.parametrize(
    "content", [" ", "\n", "\x00\x01", "\u200b", "\u200d", "\u202e", "\u2066 \u2069", "\u3164", "\u2800", "\u00ad"]
)
def test_a_text_of_nothing_is_refused(run, coffee, content):
    with pytest.raises(TextEmpty):
        run(Watermark(text=Text(content=content)), coffee)


@pytest.mark.parametrize("size", [(1, 1), (10, 10), (3000, 2), (16, 900)])
def test_any_text_fits_any_image(run, tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "odd.png")

    result, _ = run(Watermark(text=Text(content="wide words " * 18, size_px=2000), opacity=1), tmp_path / "odd.png")

    assert result.size == size


@pytest.mark.parametrize(
    ("gravity", "corner"),
    [(Gravity.NORTH_WEST, (10, 10)), (Gravity.SOUTH_EAST, (470, 270)), (Gravity.NORTH, (240, 10))],
)
def test_an_image_mark_stands_where_its_gravity_says(run, coffee, tmp_path, gravity, corner):
    Image.new("RGB", (60, 60), (0, 255, 0)).save(tmp_path / "mark.png")

    result, _ = run(
        Watermark(image=Mark(file_id="fil_m", scale=0.2), gravity=gravity, opacity=1, margin_px=10),
        coffee,
        {"fil_m": tmp_path / "mark.png"},
    )

    left, top, right, bottom = changed_box(Image.open(coffee), result)
    assert (left, top) == corner
    assert (right - left, bottom - top) == (120, 120)
    assert near(result.getpixel((left + 60, top + 60)), (0, 255, 0))


def test_a_half_opaque_mark_mixes(run, tmp_path):
    Image.new("RGB", (100, 100), (0, 0, 0)).save(tmp_path / "black.png")
    Image.new("RGB", (10, 10), (200, 200, 200)).save(tmp_path / "mark.png")

    result, _ = run(
        Watermark(image=Mark(file_id="m", scale=1), opacity=0.5, margin_px=0),
        tmp_path / "black.png",
        {"m": tmp_path / "mark.png"},
    )

    assert near(result.getpixel((50, 50)), (100, 100, 100), within=2)


def test_an_animation_gives_its_first_frame_where_the_format_holds_no_more(run, rocket, tmp_path):
    first = Image.open(rocket)
    first.save(tmp_path / "moving.webp", save_all=True, append_images=[first.rotate(90)], duration=100)

    result, _ = run(Convert(format=Format.JPEG), tmp_path / "moving.webp")

    assert result.size == (640, 427)


def test_progress_grows_to_the_end(coffee, tmp_path):
    shares: list[float] = []

    operations.run(Resize(width=2000, fit=Fit.FIT), coffee, {}, tmp_path, shares.append)

    assert shares == sorted(shares)
    assert shares[-1] == 1.0
