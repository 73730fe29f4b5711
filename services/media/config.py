"""Settings of the media service and of its workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from mesh.config import ServiceConfig


class Config(ServiceConfig):
    """What the media service must know."""

    service: ClassVar[str] = "media"
    model_config = SettingsConfigDict(env_prefix="MEDIA_")

    slots: int = Field(default_factory=lambda: max(1, (os.cpu_count() or 1) // 2), ge=1)
    """Renders that are made at a time, each by a process of its own; workers need the machine, too."""
    job_seconds: int = Field(default=10, ge=1)
    """Longest time that one render may take."""
    job_memory_bytes: int = 1024**3
    """Most memory that one render may take."""
    renders_at_once: int = Field(default=64, ge=1)
    """Different renders that are being made or wait for it; the next is refused."""
    cache_bytes: int = Field(default=1024**3, ge=0)
    """Most room on disk for renders that were made; those that were not asked for longest go first."""


class WorkerConfig(ServiceConfig):
    """What a media worker must know."""

    service: ClassVar[str] = "media-worker"
    live: ClassVar[frozenset[str]] = ServiceConfig.live | {"job_seconds"}
    model_config = SettingsConfigDict(env_prefix="MEDIA_WORKER_")

    slots: int = Field(default_factory=lambda: 2 * (os.cpu_count() or 1), ge=1)
    """Tasks that are worked on at a time; as many of them as there are cores compute, while others' bytes move."""
    job_seconds: int = Field(default=60, ge=1)
    """Longest time that one operation may take."""
    job_memory_bytes: int = 3 * 1024**3
    """Most memory that one operation may take; 100 megapixels as AVIF need 2 GiB."""
    pools: Literal["cpu", "gpu", "cpu,gpu"] | None = None
    """Whose tasks it takes; by default `cpu`, and `gpu` where it has models."""
    weights_dir: Path | None = None
    """Where models are, with their `manifest.json`."""
    model_memory_bytes: int = 2 * 1024**3
    """Most memory that models may take together, of their process or of the CUDA device."""
    model_batch: int = Field(default=8, ge=1)
    """Most items that a model computes at a time; fewer where they would not fit into the memory."""
    model_batch_seconds: float = Field(default=0.005, ge=0)
    """How long the first item of a batch waits for others."""
