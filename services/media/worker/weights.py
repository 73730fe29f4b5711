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
        return [Model(**entry) for entry in json.loads((folder / MANIFEST).read_bytes())]
    except (TypeError, ValueError) as error:
        raise ModelUnusable(f"{folder / MANIFEST} is no manifest: {error}") from error


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
