from __future__ import annotations

import pytest
import pyvips
from PIL import Image, ImageChops

from services.media import operations
from services.media.domain import (
    Convert,
    Fit,
    Format,
    Gravity,
    Interest,
    OutputTooLarge,
    Resize,
    SmartCrop,
    Text,
    TextEmpty,
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


def test_resize_by_height_alone(run, coffee):
    result, _ = run(Resize(height=100, format=Format.WEBP), coffee)

    assert (result.size, result.format) == ((150, 100), "WEBP")


def test_a_result_too_long_for_its_format_is_refused(run, tmp_path):
    strip = tmp_path / "strip.png"
    Image.new("RGB", (2000, 10)).save(strip)

    with pytest.raises(OutputTooLarge) as refusal:
        run(Resize(height=2000, fit=Fit.FIT), strip)

    assert refusal.value.metadata["width"] == "400000"


@pytest.mark.parametrize("format_", list(Format))
def test_convert_writes_every_format(run, coffee, format_):
    result, _ = run(Convert(format=format_), coffee)

    assert (result.size, result.format) == ((600, 400), format_.name)
    assert near(result.convert("RGB").getpixel((300, 200)), Image.open(coffee).getpixel((300, 200)))


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


@pytest.mark.parametrize("content", [" ", "\n", "\x00\x01", "\u200b"])
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


def test_an_animation_gives_its_first_frame(run, rocket, tmp_path):
    first = Image.open(rocket)
    first.save(tmp_path / "moving.webp", save_all=True, append_images=[first.rotate(90)], duration=100)

    result, _ = run(Convert(format=Format.JPEG), tmp_path / "moving.webp")

    assert result.size == (640, 427)


def test_a_gif_becomes_a_png_by_default(run, rocket, tmp_path):
    Image.open(rocket).save(tmp_path / "a.gif")

    result, _ = run(Resize(width=100), tmp_path / "a.gif")

    assert result.format == "PNG"


def test_progress_grows_to_the_end(coffee, tmp_path):
    shares: list[float] = []

    operations.run(Resize(width=2000, fit=Fit.FIT), coffee, {}, tmp_path, shares.append)

    assert shares == sorted(shares)
    assert shares[-1] == 1.0
