from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import numpy as np
import pytest
from onnx import helper

from scripts.local.layout import WEIGHTS
from services.media.domain import ModelMissing, ModelUnusable
from services.media.operations import models
from services.media.worker import weights
from services.media.worker.inference import Loaded
from services.media.worker.models import RemoteModels
from tests.models import SIDE_PX, described, exported, folder_with, installed, learned_upscale

ROOM = 4 * 1024**3
ODD = {"Flatten": {"axis": 1}, "ReduceMean": {"keepdims": 0}}


def test_the_installed_weights_say_whose_they_are_and_are_what_they_say():
    model = installed()

    assert (model.name, model.operation) == ("u2netp", "remove_background")
    assert hashlib.sha256(weights.read(WEIGHTS, model)).hexdigest() == model.sha256
    assert model.licence
    assert model.source


def test_a_folder_without_a_manifest_holds_no_models(tmp_path):
    assert list(weights.described(tmp_path)) == []
    assert list(weights.described(None)) == []


@pytest.mark.parametrize("content", ["[", "[1]", '[{"name": "x"}]'])
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path, content):
    (tmp_path / weights.MANIFEST).write_text(content)

    with pytest.raises(ModelUnusable):
        weights.described(tmp_path)


def test_weights_that_are_not_those_of_the_manifest_are_not_used(tmp_path):
    folder = folder_with(tmp_path / "weights", learned_upscale())
    model = weights.described(folder)[0]
    content = bytearray((folder / model.file).read_bytes())
    content[-1] ^= 1
    (folder / model.file).write_bytes(content)

    with pytest.raises(ModelUnusable) as refusal:
        weights.read(folder, model)

    assert refusal.value.metadata["sha256"] == model.sha256


def test_weights_that_are_gone_are_not_used(tmp_path):
    model, _ = described("gone", "upscale", b"")

    with pytest.raises(ModelUnusable):
        weights.read(tmp_path, model)


def test_what_is_no_model_does_not_load():
    model, content = described("nonsense", "upscale", b"\x3a\x02no")

    with pytest.raises(ModelUnusable):
        Loaded(model, content, memory_bytes=ROOM, on_cuda=False)


@pytest.mark.parametrize(
    ("operation", "node", "value"),
    [
        ("upscale", "Conv", 1.0),  # three channels, as small as they came
        ("upscale", "Flatten", 1.0),
        ("remove_background", "Conv", 1.0),  # three channels
        ("remove_background", "ReduceMean", 1.0),  # a number, of no rank
        ("remove_background", "Conv", np.nan),
    ],
)
def test_a_model_that_gives_what_is_not_said_of_it_is_told_by_its_name(operation, node, value):
    channels = 1 if np.isnan(value) else 3
    kernel = np.full((channels, 3, 1, 1), value, np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "kernel"], ["output" if node == "Conv" else "made"]),
        *([] if node == "Conv" else [helper.make_node(node, ["made"], ["output"], **ODD[node])]),
    ]
    content = exported(kernel, nodes, channels, SIDE_PX)
    model, _ = described("odd", operation, content, scale=2 if operation == "upscale" else 1)
    loaded = Loaded(model, content, memory_bytes=ROOM, on_cuda=False)

    with pytest.raises(ModelUnusable) as refusal:
        loaded.compute([np.ones(loaded.shape, np.float32)])

    assert refusal.value.metadata == {"model": "odd", "version": "1"}


@pytest.mark.parametrize(
    "more", [{"side_px": 0}, {"margin_px": 32}, {"scale": 0}, {"item_bytes": 0}, {"std": (0, 1, 1)}]
)
def test_a_manifest_whose_numbers_cannot_be_is_refused_with_the_model_s_name(tmp_path, more):
    folder = folder_with(tmp_path / "weights", described("odd", "upscale", b"", **more))

    with pytest.raises(ModelUnusable, match="odd"):
        weights.described(folder)


def test_a_model_that_was_exported_for_one_item_takes_several_and_computes_each_as_alone():
    model = installed()
    loaded = Loaded(model, weights.read(WEIGHTS, model), memory_bytes=ROOM, on_cuda=False)
    items = list(np.random.default_rng(1).random((3, *loaded.shape), np.float32))

    together = loaded.compute(items)

    alone = [loaded.compute([item])[0] for item in items]
    assert np.abs(np.stack(together) - np.stack(alone)).max() < 1e-4


def test_the_first_model_of_an_operation_serves_it(tmp_path):
    first, second = learned_upscale(), described("second", "upscale", b"")
    present = weights.described(folder_with(tmp_path / "weights", first, second))
    known = RemoteModels("nowhere", present)

    assert known.model("upscale") == weights.described(tmp_path / "weights")[0]
    assert asdict(known.model("upscale")) == json.loads(json.dumps(asdict(first[0])))
    with pytest.raises(ModelMissing) as refusal:
        known.model("generate")
    assert (refusal.value.code, refusal.value.metadata) == ("UNAVAILABLE", {"operation": "generate"})


def test_a_process_that_was_given_no_models_has_none():
    models.use(models.NONE)

    with pytest.raises(ModelMissing):
        models.present().model("upscale")
