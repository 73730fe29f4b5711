"""Weights for tests: those that scripts/up installs, and small ones that are made here in a second."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyvips
from numpy.lib.stride_tricks import sliding_window_view
from onnx import helper, numpy_helper

from scripts.local.layout import WEIGHTS
from services.media.config import WorkerConfig
from services.media.domain import Model
from services.media.operations.models import Pixels
from services.media.worker import weights
from services.media.worker.inference import Loaded
from tests.photographs import photograph

TAPS, SCALE, SIDE_PX = 7, 2, 64
LEARNED_FROM = ("astronaut.png", "chelsea.png", "hubble_deep_field.jpg", "motorcycle_left.png")


def installed() -> Model:
    """Return what removes backgrounds, as scripts/up installed it."""
    (model,) = weights.described(WEIGHTS)
    return model


def folder_with(folder: Path, *models: tuple[Model, bytes]) -> Path:
    """Make a folder of weights, the installed ones among them, and return it."""
    folder.mkdir()
    for model, content in models:
        (folder / model.file).write_bytes(content)
    present = installed()
    shutil.copyfile(WEIGHTS / present.file, folder / present.file)
    (folder / weights.MANIFEST).write_text(json.dumps([asdict(each) for each in (*(m for m, _ in models), present)]))
    return folder


def described(name: str, operation: str, content: bytes, **more: object) -> tuple[Model, bytes]:
    """Return a model that a test made, and its weights."""
    values = {
        "name": name, "version": "1", "operation": operation, "file": f"{name}.onnx", "licence": "", "source": "a test",
        "sha256": hashlib.sha256(content).hexdigest(), "item_bytes": 1024**2, "side_px": SIDE_PX,
    }  # fmt: skip
    return Model(**{**values, **more}), content


@cache
def grey() -> tuple[Model, bytes]:
    """Return a model for which the light is foreground, and which takes no time: for tests of what is around models."""
    kernel = np.full((1, 3, 1, 1), 1 / 3, np.float32)
    node = helper.make_node("Conv", ["input", "kernel"], ["output"])
    return described("grey", "remove_background", exported(kernel, [node], 1, SIDE_PX))


@cache
def learned_upscale() -> tuple[Model, bytes]:
    """Return a model that doubles the sides: the linear filter that does so best for some photographs."""
    patches, wanted = [], []
    for name in LEARNED_FROM:
        large = pyvips.Image.new_from_file(str(photograph(name)))[:3]
        large = large.crop(0, 0, large.width // SCALE * SCALE, large.height // SCALE * SCALE)
        small = large.shrink(SCALE, SCALE)
        high, low = large.numpy().astype(np.float32) / 255, small.numpy().astype(np.float32) / 255
        rows, columns = low.shape[0] - TAPS + 1, low.shape[1] - TAPS + 1
        edge = TAPS // 2 * SCALE
        inner = high[edge : edge + rows * SCALE, edge : edge + columns * SCALE]
        blocks = inner.reshape(rows, SCALE, columns, SCALE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, SCALE * SCALE)
        windows = sliding_window_view(low, (TAPS, TAPS), (0, 1)).reshape(-1, TAPS * TAPS)
        patches.append(windows[::7])
        wanted.append(blocks[::7])
    filters, *_ = np.linalg.lstsq(np.concatenate(patches), np.concatenate(wanted), rcond=None)
    kernel = np.tile(filters.T.reshape(SCALE * SCALE, 1, TAPS, TAPS), (3, 1, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "kernel"], ["subpixels"], group=3, pads=[TAPS // 2] * 4),
        helper.make_node("DepthToSpace", ["subpixels"], ["output"], blocksize=SCALE, mode="CRD"),
    ]
    content = exported(kernel, nodes, 3, SIDE_PX * SCALE)
    return described("linear", "upscale", content, scale=SCALE, margin_px=TAPS // 2)


def exported(kernel: np.ndarray, nodes: list[onnx.NodeProto], channels: int, side_px: int) -> bytes:
    """Return a model as PyTorch would have written it: for one item."""
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1, 3, SIDE_PX, SIDE_PX])],
        [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, [1, channels, side_px, side_px])],
        [numpy_helper.from_array(kernel, "kernel")],
    )
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()


class Here:
    """Runs models in this process, loaded when they are first asked for."""

    def __init__(self) -> None:
        self._loaded: dict[str, Loaded] = {}

    def model(self, operation: str) -> Model:
        return {"remove_background": installed, "upscale": lambda: learned_upscale()[0]}[operation]()

    def run(self, model: Model, items: Pixels) -> Pixels:
        if model.name not in self._loaded:
            content = weights.read(WEIGHTS, model) if model == installed() else learned_upscale()[1]
            self._loaded[model.name] = Loaded(model, content, memory_bytes=1024**3, on_cuda=False)
        return np.stack(self._loaded[model.name].compute(list(items)))


def worker_config(folder: Path, **settings: Any) -> WorkerConfig:
    """Return the settings of a worker that nobody else has to do with."""
    nobody = dict.fromkeys(("ATELIER_CONSUL_URL", "ATELIER_BROKER_URL", "ATELIER_CONTROL_ADDRESSES"), "")
    place = {"ATELIER_DATA_DIR": folder, "ATELIER_SECRETS_DIR": folder, "ATELIER_INSTANCE": "media-worker-1"}
    return WorkerConfig.model_validate({**nobody, **place, **settings})
