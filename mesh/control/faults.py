"""Faults for game days, from Consul's `faults/<service>`: what they may say, and what they become. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mesh.errors import DeadlineExceeded, Internal, MeshError, ResourceExhausted, Unavailable
from mesh.live import why

FAULT = "fault"
"""The filter's name, for routes to refer to."""
TYPE = "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault"
NONE: Mapping[str, Any] = {"@type": TYPE}

Code = Literal["UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INTERNAL"]
"""What a caller may hear from a service that is ill. Others would mean something else to it."""
ERRORS: Mapping[str, type[MeshError]] = {
    error.code: error for error in (Unavailable, DeadlineExceeded, ResourceExhausted, Internal)
}


class Fault(BaseModel):
    """What happens to a fraction of the calls of one service, at everyone who calls it.

    The edge and services each roll for themselves, before they try: what is aborted is not tried again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    delay_seconds: float = Field(default=0, ge=0, le=60)
    delay_fraction: float = Field(default=0, ge=0, le=1)
    abort_code: Code | None = None
    abort_fraction: float = Field(default=0, ge=0, le=1)

    @model_validator(mode="after")
    def _halves_belong_together(self) -> Self:
        if (self.delay_seconds > 0) is not (self.delay_fraction > 0):
            raise ValueError("delay_seconds and delay_fraction go together, both > 0")
        if (self.abort_code is not None) is not (self.abort_fraction > 0):
            raise ValueError("abort_code and abort_fraction go together, the fraction > 0")
        if not self.delay_seconds and not self.abort_code:
            raise ValueError("a fault delays or aborts; delete the key for none")
        return self

    def filter(self, *, http: bool) -> dict[str, Any]:
        """Return the filter's configuration, which says HTTP statuses to Envoy and gRPC's own to gRPC clients."""
        config: dict[str, Any] = dict(NONE)
        if self.delay_seconds:
            config["delay"] = {"fixed_delay": f"{self.delay_seconds:g}s", "percentage": _share(self.delay_fraction)}
        if self.abort_code:
            error = ERRORS[self.abort_code]
            status = {"http_status": error.http_status} if http else {"grpc_status": error.code_number}
            config["abort"] = {**status, "percentage": _share(self.abort_fraction)}
        return config


@dataclass(frozen=True, slots=True)
class Faults:
    """What ails which service, and what was refused."""

    ailing: Mapping[str, Fault] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    """Service to why its entry was not taken; the one before stays."""

    def after(self, entries: Iterable[tuple[str, bytes]]) -> Faults:
        """Return what holds once Consul has these, by service; what is not among them is over."""
        ailing, refused = {}, {}
        for service, content in entries:
            try:
                ailing[service] = Fault.model_validate_json(content)
            except ValidationError as error:
                refused[service] = why(error)
                if service in self.ailing:
                    ailing[service] = self.ailing[service]
        return Faults(ailing, refused)


def _share(fraction: float) -> dict[str, Any]:
    return {"numerator": round(fraction * 1_000_000), "denominator": "MILLION"}
