"""Settings of the user service."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from mesh.config import ServiceConfig


class Config(ServiceConfig):
    """What the user service must know."""

    service: ClassVar[str] = "user"
    model_config = SettingsConfigDict(env_prefix="USER_")

    database_url: str = Field(repr=False)
