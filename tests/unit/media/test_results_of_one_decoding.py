"""Thumbnails and pipelines: one decoding, and one encoding a result."""

from __future__ import annotations

from dataclasses import fields

import pytest
from PIL import Image, ImageChops

from services.media.domain import (
    Compress,
    Convert,
    Fit,
    Format,
    OperationUnknown,
    Optimise,
    Pipeline,
    Resize,
    SmartCrop,
    Step,
    Text,
    Thumbnails,
    Watermark,
)
from tests.unit.media.conftest import opened_and_closed

SIZES = (
    Resize(width=100),
    Resize(width=64, height=64, fit=Fit.FILL, format=Format.WEBP),
    Resize(height=200, format=Format.PNG),
    Resize(width=5000),
    Resize(width=700, fit=Fit.FIT, format=Format.AVIF),
)


def difference(image: Image.Image, other: Image.Image) -> float:
    """Return the mean difference of two images' colours, 0..255."""
    histogram = ImageChops.difference(image.convert("RGB"), other.convert("RGB")).histogram()
    return sum(value % 256 * count for value, count in enumerate(histogram)) / sum(histogram)


def test_thumbnails_come_in_order_each_as_a_resize_alone_would_give_it(run, run_all, rocket):
    results = run_all(Thumbnails(sizes=SIZES), rocket)

    assert len(results) == len(SIZES)
    for (image, written), size in zip(results, SIZES, strict=True):
        alone, _ = run(size, rocket)
        assert (image.size, image.format) == (alone.size, alone.format)
        assert (written.width, written.height) == image.size
        assert difference(image, alone) < 6  # by other filters; another image would differ by far more


@pytest.mark.parametrize("width", [1, 639, 640])
def test_a_set_of_one_is_a_resize(run, rocket, width):
    result, _ = run(Thumbnails(sizes=(Resize(width=width),)), rocket)

    assert result.size == run(Resize(width=width), rocket)[0].size


def test_thumbnails_are_decoded_as_small_as_the_largest_allows(run_all, rocket):
    """A file is opened for five sizes as often as for the largest alone."""
    largest = max(SIZES, key=lambda size: size.width or 0)

    alone = opened_and_closed(rocket, lambda: run_all(largest, rocket))

    assert opened_and_closed(rocket, lambda: run_all(Thumbnails(sizes=SIZES), rocket)) == alone


STEPS = (
    Step(resize=Resize(width=400, format=Format.GIF, quality=1)),
    Step(smart_crop=SmartCrop(width=200, height=200, format=Format.JPEG, quality=1)),
    Step(watermark=Watermark(text=Text(content="©"), format=Format.JPEG, quality=1)),
)


def test_a_pipeline_does_its_steps_in_order_and_encodes_once(run, rocket, tmp_path):
    result, _ = run(Pipeline(steps=STEPS, convert=Convert(format=Format.PNG)), rocket)

    path = rocket
    for number, step in enumerate((Resize(width=400), SmartCrop(width=200, height=200), STEPS[2].watermark)):
        losslessly = type(step)(**{**_fields(step), "format": Format.PNG})
        run(losslessly, path)
        path = (tmp_path / "result-0.png").rename(tmp_path / f"step-{number}.png")
    assert result.size == (200, 200)
    assert difference(result, Image.open(path)) == 0


def _fields(operation: Resize | SmartCrop | Watermark) -> dict[str, object]:
    return {field.name: getattr(operation, field.name) for field in fields(operation)}


def test_a_pipeline_decodes_once(run, rocket):
    alone = opened_and_closed(rocket, lambda: run(Resize(width=400), rocket))

    assert opened_and_closed(rocket, lambda: run(Pipeline(steps=STEPS), rocket)) == alone


def test_a_pipelines_end_decides_the_format_and_quality(run, rocket, tmp_path):
    plain, _ = run(Pipeline(steps=STEPS), rocket)
    webp, _ = run(Pipeline(steps=STEPS, convert=Convert(format=Format.WEBP, quality=10)), rocket)
    small, _ = run(Pipeline(steps=STEPS, compress=Compress(max_bytes=4000)), rocket)

    assert (plain.format, webp.format) == ("JPEG", "WEBP")
    assert 2000 < (tmp_path / "result-0.jpg").stat().st_size <= 4000
    assert small.size == (200, 200)


def test_a_pipeline_may_end_in_several_sizes(run_all, rocket):
    sizes = (Resize(width=100), Resize(width=50, format=Format.WEBP))

    results = run_all(Pipeline(steps=STEPS, thumbnails=Thumbnails(sizes=sizes)), rocket)

    assert [(image.size, image.format) for image, _ in results] == [((100, 100), "JPEG"), ((50, 50), "WEBP")]


def test_a_pipeline_that_enlarges_may_become_larger_than_its_input(run, tmp_path):
    Image.effect_noise((40, 40), 90).save(tmp_path / "small.jpg", quality=60)
    enlarged = Step(resize=Resize(width=400, fit=Fit.FIT))

    result, written = run(Pipeline(steps=(enlarged,), optimise=Optimise(format=Format.JPEG)), tmp_path / "small.jpg")

    assert result.size == (400, 400)
    assert written.path.stat().st_size > (tmp_path / "small.jpg").stat().st_size


def test_a_step_of_a_later_release_is_left_to_another_worker(run, rocket):
    with pytest.raises(OperationUnknown):
        run(Pipeline(steps=(Step(),)), rocket)
