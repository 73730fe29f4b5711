"""Settings of the auth service."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from mesh.config import ServiceConfig


class Config(ServiceConfig):
    """What the auth service must know."""

    service: ClassVar[str] = "auth"
    model_config = SettingsConfigDict(env_prefix="AUTH_")

    database_url: str = Field(repr=False)
