"""Settings that every service has. From the environment; secrets from files."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from pydantic_settings import BaseSettings

from mesh.errors import FailedPrecondition


class SecretMissing(FailedPrecondition):
    reason = "SECRET_MISSING"


class ServiceConfig(BaseSettings):
    """What a service must know to join the mesh.

    A service subclasses it with its name and `env_prefix`; `ATELIER_…` variables are the same for all.
    """

    service: ClassVar[str]
    live: ClassVar[frozenset[str]] = frozenset({"log_level"})
    """Fields that Consul's `config/<service>` may change while the service runs (mesh.live); read these at use."""

    consul_url: str = Field(validation_alias="ATELIER_CONSUL_URL")
    broker_url: str = Field(validation_alias="ATELIER_BROKER_URL", repr=False)
    control_addresses: str = Field(validation_alias="ATELIER_CONTROL_ADDRESSES")
    """ADS servers, `host:port`, comma-separated, the preferred first."""
    data_dir: Path = Field(validation_alias="ATELIER_DATA_DIR")
    secrets_dir: Path = Field(validation_alias="ATELIER_SECRETS_DIR")
    instance: str = Field(validation_alias="ATELIER_INSTANCE")
    """This process's name in the registry, unique, e.g. `task-1`."""

    zone: str = Field(default="", validation_alias="ATELIER_ZONE")
    """Where it runs, e.g. a data centre's room; callers in the same zone prefer it. Empty where that means nothing."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", validation_alias="ATELIER_LOG_LEVEL"
    )

    host: str = "127.0.0.1"
    port: int = 0  # any free one: peers find it through the registry
    http_port: int = 0
    health_port: int = 0
    drain_seconds: float = 10.0

    def secret(self, name: str) -> str:
        """Return the content of a secret's file.

        Raises:
            SecretMissing: there is no such file.
        """
        path = self.secrets_dir / name
        try:
            return path.read_text().strip()
        except FileNotFoundError:
            raise SecretMissing(
                f"The secret {name} is missing: expected in {path}. `scripts/up` makes it.",
                metadata={"secret": name, "path": str(path)},
            ) from None
