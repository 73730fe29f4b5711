"""The port of models: what operations ask of whoever runs them. No weights, no runtime."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.media.domain import Model, ModelMissing

Pixels = NDArray[np.float32]
"""Of shape (items, channels, rows, columns), as `domain.Model` says."""


class Models(Protocol):
    """Weights that are loaded where they are run, and what is known of them here."""

    def model(self, operation: str) -> Model:
        """Return what serves an operation, by its name in the contract.

        Raises:
            ModelMissing: nothing does.
        """

    def run(self, model: Model, items: Pixels) -> Pixels:
        """Return what a model makes of `items`, which it may compute together with other callers'.

        Raises:
            ModelUnusable: the weights do not load, or give what their description does not say.
            OutOfMemory: even one item is too much.
            WorkerCrashed: whoever ran it died.
        """


class _None:
    def model(self, operation: str) -> Model:
        raise ModelMissing(f"This worker has no model for {operation}.", metadata={"operation": operation})

    def run(self, model: Model, items: Pixels) -> Pixels:
        raise NotImplementedError  # nobody got a model to run from `model`


NONE: Models = _None()
_models = NONE


def use(models: Models) -> None:
    """Have the operations of this process run their models there."""
    global _models  # noqa: PLW0603 - as with libvips' settings in `image`, a process does with one
    _models = models


def present() -> Models:
    """Return whom this process' operations ask; without `use` it has no model."""
    return _models
