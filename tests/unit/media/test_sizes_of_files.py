"""Compress and optimise: how many bytes, and what they look like."""

from __future__ import annotations

import itertools

import pytest
import pyvips
from PIL import Image

from services.media import operations
from services.media.domain import (
    AlreadySmallest,
    Compress,
    Convert,
    Fit,
    Format,
    Optimise,
    OutputTooLarge,
    Resize,
    TargetUnreachable,
)
from services.media.operations.ssim import ssim


def gradient(path) -> None:
    """Write a PNG of more colours than a palette has, as small as it gets without loss."""
    x, y = pyvips.Image.xyz(512, 512).bandsplit()
    colours = (x / 2).bandjoin([y / 2, (x + y) / 4]).cast("uchar").copy(interpretation="srgb")
    colours.write_to_file(str(path), compression=9, filter="all", keep="none")


def seen(path) -> pyvips.Image:
    return pyvips.Image.new_from_file(str(path)).icc_transform("srgb", embedded=True, input_profile="srgb")


@pytest.mark.parametrize("format_", [Format.JPEG, Format.WEBP, Format.AVIF, Format.PNG, Format.GIF])
def test_a_compressed_file_is_as_large_as_its_target_allows_and_no_larger(run, coffee, tmp_path, format_):
    run(Convert(format=format_, quality=60), coffee)
    target = (tmp_path / f"result-0.{format_.value}").stat().st_size * 3 // 4

    result, written = run(Compress(max_bytes=target, format=format_), coffee)

    assert (result.size, result.format) == ((600, 400), format_.name)
    # PNG and GIF have few steps: of colours.
    assert target * (0.2 if format_ in (Format.PNG, Format.GIF) else 0.9) < written.path.stat().st_size <= target


def test_a_target_that_is_large_enough_costs_no_quality(run, coffee):
    result, _ = run(Compress(max_bytes=10_000_000), coffee)

    assert result.tobytes() == Image.open(coffee).convert("RGB").tobytes()


def test_a_png_that_fits_as_it_is_loses_no_colours(run, tmp_path):
    """A palette of it is larger than all its colours are: what a palette lacks is dithered."""
    gradient(tmp_path / "gradient.png")
    before = Image.open(tmp_path / "gradient.png").convert("RGB")

    result, _ = run(Compress(max_bytes=(tmp_path / "gradient.png").stat().st_size), tmp_path / "gradient.png")

    assert result.convert("RGB").tobytes() == before.tobytes()


def test_a_gif_that_fits_as_it_is_loses_no_colours(run, tmp_path):
    """With 16 of its 25 colours it is larger: what a palette lacks is dithered."""
    chart = Image.new("RGB", (320, 200), (255, 255, 255))
    for number in range(24):
        colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
        chart.paste(colour, (10 + number * 12, 10 + number * 29 % 120, 20 + number * 12, 190))
    chart.save(tmp_path / "chart.gif")
    _, whole = run(Compress(max_bytes=1_000_000), tmp_path / "chart.gif")

    result, _ = run(Compress(max_bytes=whole.path.stat().st_size), tmp_path / "chart.gif")

    assert result.convert("RGB").tobytes() == chart.tobytes()


def test_a_png_that_cannot_be_so_small_says_the_least_of_all_it_tried(run, tmp_path):
    gradient(tmp_path / "gradient.png")

    with pytest.raises(TargetUnreachable) as refusal:
        run(Compress(max_bytes=300), tmp_path / "gradient.png")

    assert int(refusal.value.metadata["smallest_bytes"]) <= (tmp_path / "gradient.png").stat().st_size


def test_a_target_that_cannot_be_met_says_what_could(run, coffee):
    with pytest.raises(TargetUnreachable) as refusal:
        run(Compress(max_bytes=500, format=Format.JPEG), coffee)
    smallest = int(refusal.value.metadata["smallest_bytes"])

    _, written = run(Compress(max_bytes=smallest, format=Format.JPEG), coffee)

    assert written.path.stat().st_size <= smallest
    assert f" {smallest} " in refusal.value.message


def test_quality_is_not_sacrificed_below_what_was_asked(run, coffee, tmp_path):
    run(Convert(format=Format.JPEG, quality=50), coffee)
    target = (tmp_path / "result-0.jpg").stat().st_size

    run(Compress(max_bytes=target, format=Format.JPEG, min_quality=45), coffee)
    with pytest.raises(TargetUnreachable):
        run(Compress(max_bytes=target, format=Format.JPEG, min_quality=60), coffee)


@pytest.mark.parametrize("format_", [Format.JPEG, Format.PNG, Format.GIF])
def test_encodings_are_bounded(coffee, tmp_path, format_):
    told: list[float] = []

    operations.run(Compress(max_bytes=30_000, format=format_), coffee, {}, tmp_path, told.append)

    assert told == sorted(told)
    assert len(told) <= 7
    assert told[-1] <= 1


@pytest.mark.parametrize("format_", [Format.JPEG, Format.WEBP, Format.AVIF, Format.PNG])
@pytest.mark.parametrize("bound", [0.9, 0.98])
def test_an_optimised_file_is_as_alike_as_was_asked_and_hardly_more(run, coffee, format_, bound):
    _, written = run(Optimise(min_ssim=bound, format=format_), coffee)

    reached = ssim(seen(coffee), seen(written.path))
    assert bound <= reached < (1.001 if format_ is Format.PNG else bound + (1 - bound) * 0.7)


def test_the_smallest_format_is_chosen(run, coffee, tmp_path):
    photograph = Image.open(coffee)
    coffee = tmp_path / "small.png"
    photograph.resize((300, 200)).save(coffee)
    result, written = run(Optimise(), coffee)
    others = {}
    for format_ in (Format.JPEG, Format.WEBP, Format.AVIF, Format.PNG):
        others[format_] = run(Optimise(format=format_), coffee)[1].path.stat().st_size

    assert result.format == written.format.name
    assert written.path.stat().st_size <= min(others.values()) or written.format is min(others, key=others.__getitem__)
    assert written.path.stat().st_size < coffee.stat().st_size / 5


def test_a_drawing_becomes_what_suits_drawings(run, tmp_path):
    drawing = Image.new("RGB", (300, 300), (255, 255, 255))
    drawing.paste((0, 0, 0), (20, 20, 280, 24))
    drawing.save(tmp_path / "drawing.png")

    _, written = run(Optimise(min_ssim=1), tmp_path / "drawing.png")

    assert written.path.stat().st_size <= (tmp_path / "drawing.png").stat().st_size
    assert Image.open(written.path).convert("RGB").tobytes() == drawing.tobytes()


def test_a_large_image_is_as_alike_as_was_asked_though_a_sample_chose(run, coffee, tmp_path):
    run(Resize(width=1800, fit=Fit.FIT, format=Format.PNG), coffee)
    large = (tmp_path / "result-0.png").rename(tmp_path / "large.png")

    _, written = run(Optimise(min_ssim=0.97, format=Format.WEBP), large)

    assert 0.97 <= ssim(seen(large), seen(written.path)) < 0.985


def test_a_sample_that_misleads_is_found_out(run, tmp_path):
    """What is between the tiles of the sample is far harder to encode."""
    noise = Image.effect_noise((1640, 1640), 90)
    for left, top in itertools.product(range(0, 1640, 410), repeat=2):
        noise.paste(128, (left, top, left + 256, top + 256))
    noise.convert("RGB").save(tmp_path / "large.png")

    _, written = run(Optimise(min_ssim=0.98, format=Format.JPEG), tmp_path / "large.png")

    assert ssim(seen(tmp_path / "large.png"), seen(written.path)) >= 0.98


def test_a_format_that_cannot_hold_the_image_is_not_tried_unless_asked_for(run, tmp_path):
    wide = pyvips.Image.black(16_384, 16, bands=3) + 255
    for x in range(0, wide.width, 50):
        wide = wide.draw_rect([0, 0, 0], x, x % 13, 20, 3, fill=True)
    wide.cast("uchar").copy(interpretation="srgb").write_to_file(str(tmp_path / "wide.png"), compression=1)

    result, written = run(Optimise(), tmp_path / "wide.png")
    with pytest.raises(OutputTooLarge) as refusal:
        run(Optimise(format=Format.WEBP), tmp_path / "wide.png")

    assert result.size == (16_384, 16)
    assert written.format is not Format.WEBP
    assert refusal.value.metadata["format"] == "WEBP"


@pytest.mark.parametrize("format_", [Format.PNG, Format.WEBP])
def test_nothing_is_lost_where_the_smallest_file_is_one_without_loss(run, tmp_path, format_):
    gradient(tmp_path / "gradient.png")
    before = Image.open(tmp_path / "gradient.png")

    result, written = run(Optimise(format=format_), tmp_path / "gradient.png")

    assert written.path.stat().st_size <= (tmp_path / "gradient.png").stat().st_size
    assert result.tobytes() == before.tobytes()


def test_a_grey_image_is_a_grey_png(run, tmp_path):
    grey = pyvips.Image.gaussnoise(200, 200, sigma=40, mean=120, seed=1).gaussblur(2).cast("uchar")
    grey.copy(interpretation="b-w").write_to_file(str(tmp_path / "grey.png"), compression=0)

    result, _ = run(Optimise(format=Format.PNG, min_ssim=1), tmp_path / "grey.png")

    assert result.mode == "L"
    assert result.tobytes() == Image.open(tmp_path / "grey.png").tobytes()


def test_transparency_is_compared_and_kept(run, tmp_path):
    clear = Image.linear_gradient("L").resize((200, 200))
    image = Image.merge("RGBA", [Image.effect_noise((200, 200), 30)] * 3 + [clear])
    image.save(tmp_path / "clear.png")

    result, _ = run(Optimise(), tmp_path / "clear.png")

    assert result.format != "JPEG"
    alpha = result.convert("RGBA").getchannel("A")
    assert all(abs(alpha.getpixel((100, y)) - clear.getpixel((100, y))) < 12 for y in range(0, 200, 20))


@pytest.mark.parametrize("format_", [Format.JPEG, None])
def test_a_jpeg_that_cannot_be_smaller_keeps_its_picture_and_loses_its_metadata(run, coffee, tmp_path, format_):
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    Image.open(coffee).save(tmp_path / "poor.jpg", quality=12, exif=exif, comment=b"secret")
    before = (tmp_path / "poor.jpg").read_bytes()

    result, written = run(Optimise(min_ssim=0.9999, format=format_), tmp_path / "poor.jpg")

    assert len(before) - 200 < written.path.stat().st_size < len(before)
    assert result.tobytes() == Image.open(tmp_path / "poor.jpg").tobytes()
    assert b"secret" not in written.path.read_bytes()
    assert b"where I live" not in written.path.read_bytes()


def test_a_file_that_cannot_be_smaller_in_its_format_is_refused(run, coffee, tmp_path):
    Image.open(coffee).save(tmp_path / "poor.webp", quality=1, method=6)

    with pytest.raises(AlreadySmallest) as refusal:
        run(Optimise(min_ssim=0.999, format=Format.WEBP), tmp_path / "poor.webp")

    assert refusal.value.metadata["size_bytes"] == str((tmp_path / "poor.webp").stat().st_size)


@pytest.mark.parametrize("ending", ["avif", "webp"])
def test_a_file_that_cannot_be_smaller_in_any_format_is_refused(run, coffee, tmp_path, ending):
    poor = tmp_path / f"poor.{ending}"
    pyvips.Image.new_from_file(str(coffee)).write_to_file(str(poor), Q=10)

    with pytest.raises(AlreadySmallest) as refusal:
        run(Optimise(), poor)

    assert refusal.value.metadata["size_bytes"] == str(poor.stat().st_size)


def test_a_file_in_another_format_that_is_asked_for_may_be_larger(run, coffee, tmp_path):
    pyvips.Image.new_from_file(str(coffee)).write_to_file(str(tmp_path / "poor.avif"), Q=10)

    result, written = run(Optimise(format=Format.WEBP), tmp_path / "poor.avif")

    assert result.format == "WEBP"
    assert written.path.stat().st_size > (tmp_path / "poor.avif").stat().st_size


def test_no_jpeg_is_alike_in_everything(run, coffee):
    with pytest.raises(TargetUnreachable) as refusal:
        run(Optimise(min_ssim=1, format=Format.JPEG), coffee)

    assert refusal.value.metadata["min_ssim"] == "1"


def test_similarity_is_one_of_the_same_less_of_worse_and_that_of_the_definition():
    photograph = pyvips.Image.gaussnoise(64, 64, sigma=40, mean=120, seed=1).cast("uchar")
    image = photograph.bandjoin([photograph, photograph]).copy(interpretation="srgb").copy_memory()
    darker, blurred = (image * 0.5).cast("uchar"), image.gaussblur(3).cast("uchar")

    assert ssim(image, image) == 1
    assert ssim(image, blurred) < ssim(image, darker) < 1
    white, faint, fainter = (image * 0 + 255).cast("uchar"), image[0] * 0 + 200, image[0] * 0 + 50
    assert ssim(white.bandjoin(faint.cast("uchar")), white.bandjoin(fainter.cast("uchar"))) < 0.6  # seen on black only
    # Flat images: only the means count, (2ab + c1) / (a² + b² + c1) with c1 = (0.01 × 255)².
    flat, other = (image * 0 + value for value in (100, 150))
    assert ssim(flat, other) == pytest.approx((2 * 100 * 150 + 6.5025) / (100**2 + 150**2 + 6.5025), abs=1e-4)
