"""What a worker serves, and what it says of itself in the registry."""

from __future__ import annotations

import json
from collections.abc import Sequence

from services.media.config import WorkerConfig
from services.media.domain import Model
from services.media.worker import cuda

CPU, GPU = "cpu", "gpu"  # pools; models do without a GPU, but theirs is the work that gains from one


def pools(config: WorkerConfig, models: Sequence[Model]) -> list[str]:
    """Return whose tasks a worker takes."""
    if config.pools:
        return config.pools.split(",")
    return [CPU, GPU] if models else [CPU]


def capacity(config: WorkerConfig, models: Sequence[Model]) -> str:
    """Return a JSON object of what a worker can do, and how much at a time."""
    return json.dumps(
        {
            "slots": config.slots,
            "pools": pools(config, models),
            "models": [f"{model.name} {model.version} ({model.operation})" for model in models],
            "device": cuda.device() or "CPU",
        }
    )
