"""Settings of the storage service: `STORAGE_…` in the environment, `ATELIER_…` for what all services share."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from mesh.config import ServiceConfig


class Config(ServiceConfig):
    """What the storage service must know."""

    service: ClassVar[str] = "storage"
    model_config = SettingsConfigDict(env_prefix="STORAGE_")

    database_url: str = Field(repr=False)
    blobs_dir: Path
    """Shared by all replicas, on a disk of this machine."""
    sweep_seconds: float = Field(default=3600, ge=1)
    """Between two walks over all bytes, for those that no file has."""
    grace_seconds: float = Field(default=3600, ge=60)
    """How old bytes without a file must be to be removed: longer than an upload may take."""
