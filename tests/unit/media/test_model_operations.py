"""What model operations make of photographs, measured against what a person drew and what the photograph was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import pyvips
from PIL import Image, ImageDraw, ImageFilter

from services.media import operations
from services.media.domain import (
    Backdrop,
    Convert,
    Defocus,
    Format,
    ImageTooLarge,
    InputDamaged,
    ModelMissing,
    OutputTooLarge,
    Pipeline,
    RemoveBackground,
    Resize,
    Step,
    Thumbnails,
    Upscale,
)
from services.media.operations import models
from tests.models import installed
from tests.photographs import photograph
from tests.unit.media.conftest import huge_png, near

# By hand, within some pixels: the astronaut with her helmet, and a cup on its saucer with a spoon.
ASTRONAUT = [
    (215, 17), (250, 18), (280, 30), (296, 55), (301, 85), (297, 108), (285, 128), (272, 134), (265, 150),
    (257, 170), (280, 185), (300, 215), (304, 245), (325, 255), (345, 275), (355, 310), (362, 345), (385, 345),
    (410, 343), (445, 357), (475, 392), (492, 430), (498, 455), (512, 460), (512, 512), (32, 512), (25, 430),
    (35, 390), (30, 340), (43, 300), (55, 260), (90, 230), (115, 208), (113, 190), (125, 165), (145, 153),
    (180, 148), (183, 132), (172, 130), (158, 110), (153, 80), (155, 60), (170, 47), (185, 40), (200, 22),
]  # fmt: skip
SAUCER, CUP = (77, 67, 479, 389), (173, 18, 410, 205)
SPOON = [(397, 70), (410, 66), (423, 72), (410, 130), (400, 130)]


def truth_of(name: str) -> np.ndarray:
    """Return where the foreground of a photograph is."""
    with Image.open(photograph(name)) as picture:
        mask = Image.new("L", picture.size)
    draw = ImageDraw.Draw(mask)
    if name == "astronaut.png":
        draw.polygon(ASTRONAUT, fill=255)
    else:
        draw.ellipse(SAUCER, fill=255)
        draw.ellipse(CUP, fill=255)
        draw.polygon(SPOON, fill=255)
    return np.asarray(mask) > 127


def alpha_of(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGBA"
    return np.asarray(image.getchannel("A"))


@pytest.mark.parametrize(("name", "overlap"), [("astronaut.png", 0.93), ("coffee.png", 0.95)])
def test_what_stays_is_what_a_person_would_cut_out(run, name, overlap):
    result, _ = run(RemoveBackground(), photograph(name))

    found, truth = alpha_of(result) > 127, truth_of(name)
    assert (found & truth).sum() / (found | truth).sum() > overlap  # intersection over union


@pytest.mark.parametrize("name", ["astronaut.png", "coffee.png", "rocket.jpg"])
def test_what_stays_is_what_rembg_finds_with_the_same_weights(run, name):
    result, _ = run(RemoveBackground(), photograph(name))

    with Image.open(photograph(name)) as picture:
        small = np.asarray(picture.convert("RGB").resize((320, 320), Image.Resampling.LANCZOS)).astype(np.float32)
    item = (small / small.max() - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)  # rembg, sessions/base.py
    (found,) = models.present().run(installed(), item.transpose(2, 0, 1)[None].astype(np.float32))[0]
    share = (found - found.min()) / (found.max() - found.min())
    mask = Image.fromarray((share * 255).astype(np.uint8)).resize(result.size, Image.Resampling.LANCZOS)
    assert np.abs(alpha_of(result).astype(float) - np.asarray(mask)).mean() / 255 < 0.006


def test_a_subject_before_another_background_is_found_as_exactly(run, tmp_path):
    cut, _ = run(RemoveBackground(), photograph("astronaut.png"))
    truth = alpha_of(cut).astype(float) / 255
    grass = Image.open(photograph("grass.png")).convert("RGB").resize(cut.size)
    grass.paste(cut, mask=cut.getchannel("A"))
    grass.save(tmp_path / "composite.png")

    result, _ = run(RemoveBackground(), tmp_path / "composite.png")

    assert np.abs(alpha_of(result) / 255 - truth).mean() < 0.03  # mean error of alpha, whose truth is known


def test_the_foreground_keeps_its_pixels_and_what_nobody_sees_has_none(run, coffee):
    result, _ = run(RemoveBackground(), coffee)

    alpha, before = alpha_of(result), np.asarray(Image.open(coffee).convert("RGB"))
    kept, gone = np.asarray(result)[alpha == 255][:, :3], np.asarray(result)[alpha == 0]
    assert np.abs(kept.astype(int) - before[alpha == 255]).max() <= 1
    assert not gone.any()


@pytest.mark.parametrize(
    ("asked", "written"),
    [(None, "PNG"), (Format.WEBP, "WEBP"), (Format.JPEG, "JPEG")],
)
def test_a_jpeg_cut_out_is_written_as_what_can_be_transparent(run, rocket, asked, written):
    result, _ = run(RemoveBackground(format=asked), rocket)

    assert (result.format, result.size) == (written, (640, 427))
    corner = result.convert("RGBA").getpixel((5, 5))
    assert corner == (255, 255, 255, 255) if written == "JPEG" else corner[3] < 10


def test_a_colour_comes_behind(run, rocket):
    result, _ = run(RemoveBackground(colour="#20c040"), rocket)

    assert (result.format, result.mode) == ("JPEG", "RGB")
    assert near(result.getpixel((5, 5)), (0x20, 0xC0, 0x40))


def test_another_image_comes_behind_and_fills_the_frame(run, coffee, rocket):
    result, written = run(RemoveBackground(image=Backdrop(file_id="fil_b")), coffee, {"fil_b": rocket})

    assert (written.width, written.height) == (600, 400)
    backdrop = Image.open(rocket).resize((600, 400))
    assert near(result.getpixel((590, 10)), backdrop.getpixel((590, 10)), within=30)
    cup = (300, 300)
    assert near(result.getpixel(cup), Image.open(coffee).convert("RGB").getpixel(cup))


def test_the_thinnest_image_behind_fills_the_frame(run, coffee, tmp_path):
    Image.new("RGB", (1, 30_000), (0, 99, 0)).save(tmp_path / "strip.png")

    result, _ = run(RemoveBackground(image=Backdrop(file_id="b")), coffee, {"b": tmp_path / "strip.png"})

    assert result.size == (600, 400)
    assert near(result.getpixel((590, 10)), (0, 99, 0))


def test_the_background_goes_out_of_focus_without_a_halo(run):
    photo = photograph("coffee.png")
    result, _ = run(RemoveBackground(blur=Defocus(radius=0.05)), photo)

    before, after = (np.asarray(each.convert("L"), float) for each in (Image.open(photo), result))
    table, cup = np.s_[20:120, 480:590], np.s_[250:330, 250:330]
    assert np.diff(after[table]).std() < 0.3 * np.diff(before[table]).std()
    assert np.abs(after[cup] - before[cup]).mean() < 2
    # Next to the cup and its saucer a plain blur has their colours in the wood.
    alpha = Image.fromarray(alpha_of(run(RemoveBackground(), photo)[0]))
    beside = (np.asarray(alpha.filter(ImageFilter.MaxFilter(21))) > 20) & (np.asarray(alpha) < 10)
    wood, ours = (np.asarray(each)[beside].mean(axis=0) for each in (Image.open(photo), result))
    plain = np.asarray(Image.open(photo).filter(ImageFilter.GaussianBlur(30)))[beside].mean(axis=0)
    assert np.abs(ours - wood).sum() < 0.6 * np.abs(plain - wood).sum()


@pytest.fixture
def holed(tmp_path, coffee):
    image = Image.open(coffee).convert("RGBA")
    image.paste((0, 0, 0, 0), (250, 250, 330, 330))  # in the cup
    image.save(tmp_path / "holed.png")
    return tmp_path / "holed.png"


def test_what_was_transparent_stays_so(run, holed):
    result, _ = run(RemoveBackground(), holed)

    assert alpha_of(result)[255:325, 255:325].max() == 0
    assert alpha_of(result)[200, 300] > 200


def test_what_was_transparent_shows_the_blurred_background(run, holed):
    result, _ = run(RemoveBackground(blur=Defocus()), holed)

    hole = np.asarray(result)[260:320, 260:320]
    assert (result.mode, result.size) == ("RGB", (600, 400))
    assert hole.std(axis=(0, 1)).max() < 12


@pytest.mark.parametrize("radius", [0.02, 0.1])
def test_what_was_transparent_shows_no_hidden_colours(run, tmp_path, coffee, radius):
    image = Image.open(coffee).convert("RGBA")
    image.paste((255, 0, 255, 0), (0, 0, 120, 400))
    image.save(tmp_path / "hiding.png")

    result, _ = run(RemoveBackground(blur=Defocus(radius=radius)), tmp_path / "hiding.png")

    assert near(result.getpixel((10, 10)), (255, 255, 255))


def test_a_cut_out_is_a_step_of_a_pipeline(run, coffee):
    steps = (Step(resize=Resize(width=300)), Step(remove_background=RemoveBackground()))
    result, _ = run(Pipeline(steps=steps), coffee)

    truth = np.asarray(Image.fromarray(truth_of("coffee.png")).resize((300, 200))) > 0
    found = alpha_of(result) > 127
    assert (found & truth).sum() / (found | truth).sum() > 0.95


def test_thumbnails_of_a_cut_out_jpeg_are_transparent(tmp_path, rocket):
    sizes = Thumbnails(sizes=(Resize(width=100), Resize(width=50)))
    steps = (Step(remove_background=RemoveBackground()),)

    results = operations.run(Pipeline(steps=steps, thumbnails=sizes), rocket, {}, tmp_path, lambda _share: None)

    assert [Image.open(each.path).mode for each in results] == ["RGBA", "RGBA"]


def test_an_upscaled_photograph_is_nearer_to_the_original_than_lanczos(run, tmp_path):
    gains = []
    for name in ("coffee.png", "rocket.jpg", "motorcycle_right.png", "camera.png"):  # none of those it was made from
        original = pyvips.Image.new_from_file(str(photograph(name))).colourspace("srgb")[:3]
        original = original.crop(0, 0, original.width // 2 * 2, original.height // 2 * 2)
        small = tmp_path / "small.png"
        original.shrink(2, 2).cast("uchar").write_to_file(str(small), keep="none")
        result, written = run(Upscale(), small)
        assert (written.width, written.height) == (original.width, original.height)
        lanczos = Image.open(small).convert("RGB").resize(result.size, Image.Resampling.LANCZOS)
        truth = original.numpy().astype(float)
        gains.append(decibels(np.asarray(result.convert("RGB")), truth) - decibels(np.asarray(lanczos), truth))

    assert min(gains) > 0
    assert np.mean(gains) > 0.2


def decibels(image: np.ndarray, truth: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio."""
    return float(10 * np.log10(255**2 / np.mean((image - truth) ** 2)))


def test_tiles_leave_no_seams(run, tmp_path):
    ramp = np.tile(np.linspace(40, 200, 150).astype(np.uint8), (130, 1))  # more than two tiles each way
    Image.fromarray(np.dstack([ramp] * 3)).save(tmp_path / "ramp.png")

    result, _ = run(Upscale(), tmp_path / "ramp.png")

    pixels = np.asarray(result.convert("L")).astype(int)
    assert np.abs(np.diff(pixels[:, 4:-4], axis=1)).max() <= 2
    assert np.abs(np.diff(pixels, axis=0)).max() <= 1


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_any_factor_is_made_of_the_models_own(run, coffee, factor):
    _, written = run(Upscale(factor=factor), coffee)

    assert (written.width, written.height) == (600 * factor, 400 * factor)


def test_transparency_is_enlarged_too(run, tmp_path):
    half = Image.new("RGBA", (70, 40), (200, 30, 30, 255))
    half.paste((200, 30, 30, 0), (0, 0, 35, 40))
    half.save(tmp_path / "half.png")

    result, _ = run(Upscale(), tmp_path / "half.png")

    assert (result.mode, result.size) == ("RGBA", (140, 80))
    assert (result.getpixel((20, 40))[3], result.getpixel((120, 40))[3]) == (0, 255)


@pytest.mark.parametrize("hidden", [(0, 0, 0, 0), (255, 0, 255, 0)], ids=["black", "magenta"])
def test_hidden_colours_do_not_come_out_at_edges(run, tmp_path, hidden):
    logo = Image.new("RGBA", (150, 60), hidden)
    logo.paste((255, 255, 255, 255), (40, 15, 110, 45))
    logo.save(tmp_path / "logo.png")

    result, _ = run(Upscale(), tmp_path / "logo.png")

    on_white = Image.new("RGBA", result.size, (255, 255, 255, 255))
    on_white.alpha_composite(result)
    assert np.asarray(on_white).min() >= 254


def test_what_would_be_too_large_is_refused_before_its_pixels_are_read(run, tmp_path):
    huge = huge_png(tmp_path / "huge.png", 9000)

    with pytest.raises(OutputTooLarge) as refusal:
        run(Upscale(), huge)

    assert refusal.value.metadata["width"] == "18000"


@pytest.mark.parametrize("operation", [RemoveBackground(), Upscale()], ids=lambda each: type(each).__name__)
def test_hostile_images_are_refused_as_by_other_operations(run, tmp_path, rocket, operation):
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(rocket.read_bytes()[:9000])

    with pytest.raises(InputDamaged):
        run(operation, cut)
    with pytest.raises(ImageTooLarge):
        run(operation, huge_png(tmp_path / "huge.png", 16_000))


def test_without_weights_a_model_operation_says_which_are_missing(run, rocket):
    class Nothing:
        def model(self, operation: str) -> Mapping[str, str]:
            raise ModelMissing("None.", metadata={"operation": operation})

    models.use(Nothing())

    with pytest.raises(ModelMissing) as refusal:
        run(RemoveBackground(), rocket)
    assert refusal.value.metadata == {"operation": "remove_background"}
    run(Convert(format=Format.PNG), Path(rocket))
