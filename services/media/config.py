"""Settings of the media service and of its workers."""

from __future__ import annotations

import os
from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from mesh.config import ServiceConfig


class Config(ServiceConfig):
    """What the media service must know."""

    service: ClassVar[str] = "media"
    model_config = SettingsConfigDict(env_prefix="MEDIA_")


class WorkerConfig(ServiceConfig):
    """What a media worker must know."""

    service: ClassVar[str] = "media-worker"
    live: ClassVar[frozenset[str]] = ServiceConfig.live | {"job_seconds"}
    model_config = SettingsConfigDict(env_prefix="MEDIA_WORKER_")

    slots: int = Field(default_factory=lambda: max(1, os.cpu_count() or 1), ge=1)
    """Images that are worked on at a time, each by a process of its own."""
    job_seconds: int = Field(default=60, ge=1)
    """Longest time that one operation may take."""
    job_memory_bytes: int = 3 * 1024**3
    """Most memory that one operation may take; 100 megapixels as AVIF need 2 GiB."""
