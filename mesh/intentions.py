"""Consul's intentions: what they take from what the policies allow. They never add to it.

Every service follows those about itself and keeps the last known beside its leaf, so that a denial outlives Consul's
absence, and the service's own restart meanwhile.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import consul.aio
from consul.callback import CB

from mesh import discovery
from mesh.certificates import Leaf
from mesh.config import ServiceConfig
from mesh.errors import PermissionDenied, Unavailable

ALL = "/v1/connect/intentions"
ANY = "*"
FILE = "intentions.json"

log = logging.getLogger(__name__)


class CallerDeniedByIntention(PermissionDenied):
    reason = "CALLER_DENIED_BY_INTENTION"


class IntentionsUnknown(Unavailable):
    reason = "INTENTIONS_UNKNOWN"


@dataclass(frozen=True, slots=True)
class Intention:
    """What an operator wants of calls from one service to another; either may be `*`, any."""

    source: str
    destination: str
    precedence: int
    """As Consul ranks it: an exact destination goes before an exact source, and both before any."""
    allows: bool


def from_consul(found: Iterable[Mapping[str, Any]] | None) -> tuple[Intention, ...]:
    """Return what Consul's interface answers; it says null for none.

    One that allows some requests only (Consul 1.9 and later) denies, as it does wherever Consul judges connections.
    """
    return tuple(
        Intention(each["SourceName"], each["DestinationName"], each["Precedence"], each.get("Action") == "allow")
        for each in found or ()
    )


def denied(intentions: Iterable[Intention], source: str, destination: str) -> bool:
    """Tell whether calls are refused: the one intention that counts is that of the highest precedence.

    Where there is none, Consul's own answer would follow from its ACLs, which deny. Ours is that policies decide.
    """
    about = [each for each in intentions if each.source in (source, ANY) and each.destination in (destination, ANY)]
    return bool(about) and not max(about, key=lambda each: each.precedence).allows


class Intentions:
    """Those about one service, always the newest.

    Args:
        leaf: of the service.
    """

    def __init__(self, leaf: Leaf) -> None:
        self._service = leaf.service
        self._path = leaf.folder / FILE
        self._known: Sequence[Intention] | None = None
        self.on_change: Callable[[], None] = lambda: None
        """Called when somebody may be refused who was let in before."""
        with suppress(FileNotFoundError):
            try:
                self._known = tuple(Intention(**each) for each in json.loads(self._path.read_text()))
            except (ValueError, TypeError):
                log.exception("%s cannot be read; Consul is asked", self._path)

    def take(self, known: Sequence[Intention]) -> None:
        """Let calls in by these from now on."""
        self._known = known
        self.on_change()

    async def check(self) -> None:
        """Raise IntentionsUnknown until they have been read once, in this life or an earlier one."""
        self._present()

    def require_allowed(self, caller: str) -> None:
        """Refuse a caller that an intention denies.

        Raises:
            CallerDeniedByIntention: one does.
            IntentionsUnknown: Consul has not been heard yet, in this life or an earlier one.
        """
        if denied(self._present(), caller, self._service):
            raise CallerDeniedByIntention(
                f"An intention in Consul denies {caller} to call {self._service}.",
                metadata={"caller": caller, "service": self._service},
            )

    async def follow(self, config: ServiceConfig) -> None:
        """Take over what Consul says, for ever. While it is away, the last stays."""
        async with discovery.connected(config) as client:
            # What may not be read is left out of the list, which would look like permission; `match` refuses, but
            # tells no index to wait by (1.8). So the one rings and the other tells.
            rings = discovery.asking(client, ALL)

            async def query(**parameters: Any) -> tuple[str, Any]:
                index, _ = await rings(**parameters)
                return index, await _about(client, self._service)

            async for found in discovery.answers(client, query):
                fresh = from_consul(found)
                if fresh != self._known:
                    if fresh or self._known:
                        log.warning("intentions have changed", extra={"intentions": [asdict(each) for each in fresh]})
                    self.take(fresh)
                    self._keep(fresh)

    def _present(self) -> Sequence[Intention]:
        if self._known is None:
            raise IntentionsUnknown("It is not known yet who may call; try again.", retry_after_seconds=1)
        return self._known

    def _keep(self, known: Sequence[Intention]) -> None:
        """Write in one step, for this user's eyes only."""
        fresh = self._path.with_suffix(".new")
        try:
            fresh.unlink(missing_ok=True)
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump([asdict(each) for each in known], file)
            fresh.replace(self._path)
        except OSError:
            log.exception("intentions could not be kept; they hold all the same")


async def _about(client: consul.aio.Consul, service: str) -> Any:
    parameters = [("by", "destination"), ("name", service)]
    found = await client.http.get(
        CB.json(allow_404=False), f"{ALL}/match", params=parameters, headers=client.prepare_headers()
    )
    return found[service]
