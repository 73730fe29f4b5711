"""Which instances of which services are healthy, followed in Consul by blocking queries."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import consul.aio

from mesh import discovery
from mesh.discovery import PASSING

log = logging.getLogger(__name__)

# After a restart Consul calls every instance critical until each was checked again, and after a wipe it knows none
# until each has registered again.
SETTLE_SECONDS = 15.0


@dataclass(frozen=True, order=True, slots=True)
class Instance:
    """One passing instance of a service."""

    host: str
    port: int
    instance_id: str = ""
    version: str = ""
    zone: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """One registered instance, passing or not, for people to look at."""

    instance: Instance
    status: str
    """passing, warning or critical: the worst of its checks."""
    output: str
    """What the worst check said."""
    since: datetime
    """Since when it has this status, as far as this process has seen."""
    agent: str
    """The Consul agent that holds the registration and runs its checks."""
    meta: Mapping[str, str]
    """What the instance says of itself."""


Catalog = Mapping[str, tuple[Instance, ...]]
"""Service name to its passing instances, sorted."""


def settled(known: Catalog, read: Catalog) -> Catalog:
    """Return `read`, with the instances of `known` that it lacks: what is true of a Consul that is still waking up."""
    return {name: tuple(sorted({*known.get(name, ()), *read.get(name, ())})) for name in {*known, *read}}


class Follower:
    """Keeps `catalog` as Consul has it; an error leaves the last good one.

    Args:
        client: an open client of the local agent.
        names: services to follow from the beginning; others follow when the registry lists them.
        known: the catalog before Consul has answered.
        changed: called after every change of `catalog`.
        settle_seconds: for how long after a failed query instances may come but not go.
    """

    def __init__(
        self,
        client: consul.aio.Consul,
        names: Iterable[str],
        known: Catalog,
        changed: Callable[[], None],
        settle_seconds: float = SETTLE_SECONDS,
    ) -> None:
        self._client = client
        self._names = frozenset(names)
        self._read: dict[str, tuple[Instance, ...]] = {}
        self._settle_seconds = settle_seconds
        self._distrusted_until = 0.0
        self._changed = changed
        self.catalog: Catalog = known
        self.seen: dict[str, dict[str, Seen]] = {}
        """Service name to instance id to what was last seen of it."""
        self.complete = asyncio.Event()
        """Set once every service has been read, or Consul has failed to answer and `known` must do."""

    @property
    def distrusted(self) -> bool:
        """Whether Consul has lately failed or begun anew, so that what it lacks may yet be there."""
        return asyncio.get_running_loop().time() < self._distrusted_until

    async def run(self) -> None:
        """Follow for ever."""
        async with asyncio.TaskGroup() as group:
            followed: set[str] = set()

            def follow(names: Iterable[str]) -> None:
                for name in set(names) - followed:
                    followed.add(name)
                    group.create_task(self._follow(name))

            follow(self._names)
            async for listed in discovery.answers(self._client, self._client.catalog.services, self._distrust):
                follow(listed)

    async def _follow(self, name: str) -> None:
        query = partial(self._client.health.service, name)  # also those that do not pass: people ask why
        async for entries in discovery.answers(self._client, query, self._distrust):
            before = self.seen.get(name, {})
            now = datetime.now(UTC)
            seen = [_seen(entry, before, now) for entry in entries]
            self.seen[name] = {each.instance.instance_id: each for each in seen}
            self._read[name] = tuple(sorted(each.instance for each in seen if each.status == PASSING))
            self._publish()

    def _distrust(self, why: str) -> None:
        loop = asyncio.get_running_loop()
        if not self.distrusted:  # once an outage, not once a service and try
            log.warning("Consul is away or beginning anew; the last catalog stays: %s", why)
        self._distrusted_until = loop.time() + self._settle_seconds
        loop.call_later(self._settle_seconds + 0.1, self._publish)
        if self.catalog and not self.complete.is_set():
            self.complete.set()
            self._changed()

    def _publish(self) -> None:
        if not self._names <= self._read.keys():
            return  # not read in full yet: a partial catalog would look like services that are gone
        catalog = settled(self.catalog, self._read) if self.distrusted else dict(self._read)
        if catalog != self.catalog or not self.complete.is_set():
            self.catalog = catalog
            self.complete.set()
            self._changed()


def _seen(entry: Mapping[str, Any], before: Mapping[str, Seen], now: datetime) -> Seen:
    service, node = entry["Service"], entry["Node"]
    meta = service.get("Meta") or {}
    instance = Instance(
        host=service["Address"] or node["Address"],
        port=service["Port"],
        instance_id=service["ID"],
        version=meta.get("version", ""),
        zone=meta.get("zone", ""),
    )
    status, output = discovery.health(entry)
    last = before.get(instance.instance_id)
    return Seen(
        instance=instance,
        status=status,
        output=output,
        since=last.since if last and last.status == status else now,
        agent=node.get("Node", ""),
        meta=meta,
    )
