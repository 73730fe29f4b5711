"""Settings of the task service: `TASK_…` in the environment, `ATELIER_…` for what all services share."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode, SettingsConfigDict

from mesh.config import ServiceConfig
from services.task.domain import Terms
from services.task.webhooks import Network


def _split(text: object) -> object:
    return [each.strip() for each in text.split(",") if each.strip()] if isinstance(text, str) else text


class Config(ServiceConfig):
    """What the task service must know."""

    service: ClassVar[str] = "task"
    live: ClassVar[frozenset[str]] = ServiceConfig.live | {"attempts", "backoff_seconds", "kept_days"}
    model_config = SettingsConfigDict(env_prefix="TASK_")

    database_url: str = Field(repr=False)
    lease_seconds: float = 15.0
    attempts: int = Field(default=3, ge=1, le=20)
    backoff_seconds: float = Field(default=1.0, ge=0, le=3600)
    result_max_bytes: int = 512 * 1024 * 1024
    # Longer than an idempotency key lives: a repeated call must find its task.
    kept_days: float = Field(default=30.0, ge=2, le=3650)

    # Where webhooks may go though the world cannot: for who tries them on their own machine. Comma-separated.
    webhook_allowed_networks: Annotated[tuple[Network, ...], NoDecode, BeforeValidator(_split)] = ()

    def terms(self) -> Terms:
        """Return what a worker is promised and how often a task is tried, as it is now."""
        return Terms(
            lease=timedelta(seconds=self.lease_seconds),
            attempts=self.attempts,
            backoff=timedelta(seconds=self.backoff_seconds),
            kept=timedelta(days=self.kept_days),
            result_max_bytes=self.result_max_bytes,
        )
