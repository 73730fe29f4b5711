from __future__ import annotations

import pypdfium2
import pytest
from PIL import Image

from services.media import operations
from services.media.domain import Compress, Convert, Format, Optimise, Pipeline, Resize, Step
from tests.unit.media.conftest import near


@pytest.fixture
def page(tmp_path):
    """Do an operation and show its one page; a pixel of the image is 3/4 of a point."""

    def shown(work, source) -> Image.Image:
        (written,) = operations.run(work, source, {}, tmp_path, lambda _share: None)
        document = pypdfium2.PdfDocument(written.path)
        assert len(document) == 1
        assert written.path.name == "result-0.pdf"
        image = document[0].render(scale=4 / 3).to_pil()
        assert image.size == (written.width, written.height)
        return image

    return shown


@pytest.fixture
def plain(coffee, tmp_path):
    path = tmp_path / "plain.jpg"
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    Image.open(coffee).save(path, quality=90, exif=exif, comment=b"secret")
    return path


def test_an_image_becomes_a_page(page, coffee):
    shown = page(Convert(format=Format.PDF, quality=95), coffee)

    assert shown.size == (600, 400)
    for spot in ((20, 20), (300, 200), (580, 380)):
        assert near(shown.getpixel(spot), Image.open(coffee).getpixel(spot), within=20)


def test_a_jpegs_picture_goes_in_as_it_is_without_its_metadata(page, plain, tmp_path):
    shown = page(Convert(format=Format.PDF, quality=1), plain)

    document = (tmp_path / "result-0.pdf").read_bytes()
    pixels_begin = plain.read_bytes().index(b"\xff\xda")
    assert plain.read_bytes()[pixels_begin:] in document
    assert near(shown.getpixel((300, 200)), Image.open(plain).getpixel((300, 200)), within=3)
    for hidden in (b"where I live", b"secret", b"Exif"):
        assert hidden not in document


@pytest.mark.parametrize(
    "change",
    [
        lambda stream: stream + b"PK\x03\x04 hidden",
        lambda stream: stream[:2] + b"\xff\xfe\x00\x0chidden    " + stream[2:],
        lambda stream: stream[:-2] + b"hidden" + stream[-2:],
    ],
    ids=["behind the end", "in a comment", "between the pixels and the end"],
)
def test_what_is_hidden_in_a_jpeg_is_not_in_its_page(page, plain, tmp_path, change):
    plain.write_bytes(change(plain.read_bytes()))

    shown = page(Convert(format=Format.PDF), plain)

    assert shown.size == (600, 400)
    assert b"hidden" not in (tmp_path / "result-0.pdf").read_bytes()


def test_a_grey_jpeg_is_a_grey_page(page, coffee, tmp_path):
    Image.open(coffee).convert("L").save(tmp_path / "grey.jpg")

    shown = page(Convert(format=Format.PDF), tmp_path / "grey.jpg")

    assert near(
        shown.convert("RGB").getpixel((300, 200)), Image.open(tmp_path / "grey.jpg").convert("RGB").getpixel((300, 200))
    )


@pytest.mark.parametrize("kind", ["turned", "wide", "cmyk", "transparent"])
def test_what_a_page_cannot_show_as_it_is_is_made_upright_srgb_first(page, coffee, photos, tmp_path, kind):
    upright = Image.open(coffee)
    source, size = tmp_path / "odd.jpg", (600, 400)
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        upright.transpose(Image.Transpose.ROTATE_90).save(source, exif=exif)
    elif kind == "wide":
        source, size = photos / "rocket.jpg", (640, 427)  # Adobe RGB
    elif kind == "cmyk":
        upright.convert("CMYK").save(source)
    else:
        source = tmp_path / "clear.png"
        Image.new("RGBA", size, (255, 0, 0, 0)).save(source)

    shown = page(Convert(format=Format.PDF, quality=95, background="#0000ff"), source)

    assert shown.size == size
    if kind == "transparent":
        assert near(shown.getpixel((300, 200)), (0, 0, 255))
    elif kind != "wide":
        assert near(shown.getpixel((300, 200)), upright.getpixel((300, 200)), within=60)


@pytest.mark.parametrize(
    "work",
    [
        Resize(width=300, format=Format.PDF),
        Compress(max_bytes=9000, format=Format.PDF),
        Optimise(format=Format.PDF),
        Pipeline(steps=(Step(resize=Resize(width=300)),), convert=Convert(format=Format.PDF)),
    ],
    ids=lambda each: type(each).__name__,
)
def test_every_operation_writes_pages(page, coffee, work):
    shown = page(work, coffee)

    assert shown.size in ((300, 200), (600, 400))
