"""Settings of the control plane."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode, SettingsConfigDict

from mesh.config import ServiceConfig
from mesh.control.edge import Rate
from mesh.control.snapshot import MAX_REQUESTS

_Rate = Annotated[
    Rate, NoDecode, BeforeValidator(lambda value: Rate.parsed(value) if isinstance(value, str) else value)
]
_Origins = Annotated[
    tuple[str, ...],
    NoDecode,
    BeforeValidator(
        lambda value: tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value
    ),
]


class Config(ServiceConfig):
    """`CONTROL_…`; what the edge does is set here, too, for this compiles it.

    A rate is `per second:burst`, of one user, or of one address where no token is asked for.
    """

    service: ClassVar[str] = "control"
    model_config = SettingsConfigDict(env_prefix="CONTROL_")

    address: str = "127.0.0.1:17100"
    """Where xDS clients connect; fixed, because nothing can be looked up before."""
    edge_host: str = "127.0.0.1"
    edge_port: int = Field(default=8080, validation_alias="ATELIER_EDGE_PORT")
    edge_secrets: str = Field(validation_alias="ATELIER_EDGE_SECRETS")
    """The folder, as Envoy sees it, whose leaf.json and roots.json tell where its certificates are."""
    cors_origins: _Origins = Field(default=(), validation_alias="ATELIER_CORS_ORIGINS")
    """Origins whose pages may call, comma-separated; those of this machine when empty."""
    max_requests: int = Field(default=MAX_REQUESTS, ge=1)
    """To one service at a time, of the edge and of each service; the next is refused."""
    rate_read: _Rate = Rate(200, 400)
    rate_write: _Rate = Rate(50, 200)
    rate_sign_in: _Rate = Rate(5, 100)
    rate_bytes: _Rate = Rate(50, 200)
