"""Weights on disk: a folder with files and a manifest that says what each is. Nothing is fetched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from services.media.domain import Model, ModelUnusable

MANIFEST = "manifest.json"


def described(folder: Path | None) -> Sequence[Model]:
    """Return what a folder's manifest lists; nothing without a folder or without a manifest in it.

    Raises:
        ModelUnusable: the manifest makes no sense.
    """
    if folder is None or not (folder / MANIFEST).exists():
        return ()
    try:
        models = [Model(**entry) for entry in json.loads((folder / MANIFEST).read_bytes())]
        for model in models:
            _require_sense(model)
    except (TypeError, ValueError) as error:
        raise ModelUnusable(f"{folder / MANIFEST} is no manifest: {error}") from error
    return models


def _require_sense(model: Model) -> None:
    if not (
        0 <= 2 * model.margin_px < model.side_px and model.scale > 0 and model.item_bytes > 0 and min(model.std) > 0
    ):
        raise ValueError(f"{model.name}'s side_px, margin_px, scale, item_bytes or std cannot be")


def read(folder: Path, model: Model) -> bytes:
    """Return the weights of a model.

    Raises:
        ModelUnusable: they are not there, or not what the manifest says.
    """
    try:
        content = (folder / model.file).read_bytes()
    except OSError as error:
        raise ModelUnusable(f"The weights {model.file} cannot be read.", metadata={"model": model.name}) from error
    if hashlib.sha256(content).hexdigest() != model.sha256:
        raise ModelUnusable(
            f"The weights {model.file} are not those of {model.name} {model.version}: their SHA-256 differs.",
            metadata={"model": model.name, "version": model.version, "sha256": model.sha256},
        )
    return content
