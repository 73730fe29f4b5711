"""Settings that change while a service runs: Consul's `config/<service>` over what the environment said first."""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import Annotated, Any

from pydantic import ConfigDict, ValidationError, create_model

from mesh import discovery
from mesh.config import ServiceConfig

log = logging.getLogger(__name__)


class Live:
    """Keeps those fields of a configuration that it calls live as Consul says.

    All of an entry is taken or none of it: what is refused leaves the last good settings. A field that an entry does
    not name is as the environment has it, and so are all when there is no entry.

    Args:
        config: whose fields change, under whoever reads them at use.
    """

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        fields = {name: type(config).model_fields[name] for name in sorted(config.live)}
        definitions: dict[str, Any] = {
            name: (Annotated[(field.annotation, name, *field.metadata)], getattr(config, name))
            for name, field in fields.items()
        }
        self._model = create_model("Live", __config__=ConfigDict(extra="forbid", strict=True), **definitions)
        self.meta = {"zone": config.zone} if config.zone else {}
        """What the instance's registration says: where it is, and for `atelier mesh config` what is in force."""
        self._said("")

    def take(self, content: bytes | None) -> None:
        """Take over what an entry says; None when there is none."""
        try:
            wanted = self._model() if content is None else self._model.model_validate_json(content)
        except ValidationError as error:
            refusal = why(error)
            log.warning("config/%s is refused, what held before stays: %s", self._config.service, refusal)
            self._said(refusal)
            return
        changed = {name: value for name, value in wanted if getattr(self._config, name) != value}
        for name, value in changed.items():
            setattr(self._config, name, value)
        if changed:
            log.info("settings changed", extra={"settings": changed})
        logging.getLogger().setLevel(self._config.log_level)
        self._said("")

    async def follow(self) -> None:
        """Take over what Consul says, for ever. While it is away, the last stays."""
        async with discovery.connected(self._config) as client:
            async for found in discovery.answers(client, partial(client.kv.get, f"config/{self._config.service}")):
                self.take(found["Value"] or b"" if found else None)

    def _said(self, refusal: str) -> None:
        present = {name: getattr(self._config, name) for name in sorted(self._config.live)}
        self.meta["settings"] = json.dumps(present)
        self.meta["settings_refused"] = refusal


def why(error: ValidationError) -> str:
    """Return in one line what pydantic found wrong."""
    found: list[Any] = error.errors(include_url=False, include_context=False)
    return "; ".join(": ".join(filter(None, (".".join(map(str, each["loc"])), each["msg"]))) for each in found)
