"""R-29: a file that a stranger sends is hostile."""

from __future__ import annotations

import pytest
import pyvips
from PIL import Image

from services.media.domain import (
    Convert,
    Format,
    ImageTooLarge,
    InputDamaged,
    InputUnsupported,
    Resize,
    Watermark,
)
from services.media.domain import Image as Mark
from tests.hostile import raws
from tests.unit.media.conftest import EXAMPLES, huge_png


@pytest.fixture(params=EXAMPLES, ids=lambda operation: type(operation).__name__)
def operation(request):
    return request.param


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello world, I am no image " * 20,
        b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><rect width="5" height="5"/></svg>',
        b"%PDF-1.4\n%%EOF",
        b"P6 2 2 255\n" + bytes(12),
        b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(100),
    ],
    ids=["empty", "text", "svg", "pdf", "ppm", "jpeg2000"],
)
def test_what_is_no_image_of_the_six_kinds_is_refused(run, tmp_path, operation, content):
    (tmp_path / "photo.jpg").write_bytes(content)

    with pytest.raises(InputUnsupported):
        run(operation, tmp_path / "photo.jpg")


@pytest.mark.parametrize(("name", "content"), list(raws()))
def test_a_camera_s_raw_file_is_refused_as_what_it_is_and_its_preview_not_taken(run, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(InputUnsupported) as refusal:
        run(Resize(width=10), tmp_path / name)

    assert "raw" in refusal.value.message


def test_a_tiff_with_smaller_versions_of_itself_is_no_raw_file(run, rocket, tmp_path):
    image = pyvips.Image.new_from_file(str(rocket))
    image.tiffsave(str(tmp_path / "pyramid.tif"), tile=True, pyramid=True, subifd=True)

    result, _ = run(Resize(width=100), tmp_path / "pyramid.tif")

    assert result.width == 100


@pytest.mark.parametrize("share", [0.0005, 0.05, 0.5, 0.95])
@pytest.mark.parametrize("name", ["rocket.jpg", "coffee.png"])
def test_a_truncated_image_is_damaged(run, photos, tmp_path, operation, share, name):
    whole = (photos / name).read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(whole[: max(24, int(len(whole) * share))])

    with pytest.raises(InputDamaged) as refusal:
        run(operation, cut)

    assert "vips" not in refusal.value.message.lower()


@pytest.mark.parametrize("format_", ["webp", "avif", "tiff", "gif"])
def test_a_truncated_image_of_the_other_kinds_is_refused(run, rocket, tmp_path, format_):
    Image.open(rocket).save(tmp_path / f"whole.{format_}")
    whole = (tmp_path / f"whole.{format_}").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])

    with pytest.raises((InputDamaged, InputUnsupported)):
        run(Convert(format=Format.PNG), tmp_path / "cut")


def test_an_enormous_claim_is_refused_from_its_header(run, tmp_path, operation):
    with pytest.raises(ImageTooLarge) as refusal:
        run(operation, huge_png(tmp_path / "bomb.png", 60_000))

    assert refusal.value.metadata["width"] == "60000"


def test_a_claim_within_bounds_without_the_pixels_is_damaged(run, tmp_path, operation):
    with pytest.raises(InputDamaged):
        run(operation, huge_png(tmp_path / "liar.png", 5000))


def test_too_many_frames_are_refused(run, tmp_path):
    frames = [Image.new("L", (4, 4), 250 * (n % 2)) for n in range(501)]
    frames[0].save(tmp_path / "long.gif", save_all=True, append_images=frames[1:], duration=20)

    with pytest.raises(ImageTooLarge) as refusal:
        run(Resize(width=2), tmp_path / "long.gif")

    assert refusal.value.metadata["frames"] == "501"


def test_scientific_pixels_are_refused(run, tmp_path):
    Image.new("F", (20, 20)).save(tmp_path / "float.tif")

    with pytest.raises(InputUnsupported):
        run(Convert(format=Format.PNG), tmp_path / "float.tif")


@pytest.mark.parametrize(
    ("interpretation", "bands"),
    [("b-w", [200, 255, 0]), ("srgb", [200, 100, 50, 255, 0]), ("cmyk", [20, 100, 50, 0, 255, 0])],
)
def test_a_tiff_with_a_spot_colour_or_a_second_mask_is_refused(run, tmp_path, interpretation, bands):
    image = (pyvips.Image.black(40, 30, bands=len(bands)) + bands).cast("uchar").copy(interpretation=interpretation)
    image.tiffsave(str(tmp_path / "channels.tif"))

    with pytest.raises(InputUnsupported) as refusal:
        run(Convert(), tmp_path / "channels.tif")

    assert "channel" in refusal.value.message


def test_a_damaged_mark_is_named_as_damaged(run, coffee, rocket, tmp_path):
    cut = tmp_path / "mark"
    cut.write_bytes(rocket.read_bytes()[:9000])

    with pytest.raises(InputDamaged):
        run(Watermark(image=Mark(file_id="m")), coffee, {"m": cut})
