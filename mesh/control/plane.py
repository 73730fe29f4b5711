"""Turns what is known into snapshots, whenever some of it has changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import consul.aio
import jwt

from mesh import discovery
from mesh.certificates import Leaf
from mesh.contract import Contract
from mesh.control import edge, known, snapshot
from mesh.control.catalog import Follower
from mesh.control.faults import Faults
from mesh.control.known import Known
from mesh.control.server import Publisher
from mesh.errors import Unavailable
from mesh.identity import IdentityFeed, Verifier
from mesh.intentions import ALL, Intention, from_consul

CALM_SECONDS = 0.1  # between two snapshots: what flaps in the registry costs its followers no more than that
EXPIRY_SECONDS = 60.0  # how often the edge is relieved of revocations that concern no valid token any more

FAULTS = "faults/"
"""Where Consul keeps a fault for each service that has one."""

log = logging.getLogger(__name__)


class NotReadYet(Unavailable):
    reason = "NOT_READ_YET"


class Plane:
    """Follows the registry and the identity feed, and publishes.

    Args:
        client: an open client of the local Consul agent.
        contract: read from `image`.
        image: the contracts' descriptors.
        settings: what the installation wants of its edge.
        path: where the last known is kept.
        leaf: its certificate, which names the mesh.
        feed: the identity feed.
        publisher: is given every new pair of snapshots.
        verifier: is told what the identity feed says, and knows what of it holds.
    """

    def __init__(
        self,
        *,
        client: consul.aio.Consul,
        contract: Contract,
        image: bytes,
        settings: edge.Settings,
        path: Path,
        leaf: Leaf,
        feed: IdentityFeed,
        publisher: Publisher,
        verifier: Verifier,
    ) -> None:
        self._client = client
        self._contract = contract
        self._image = image
        self._settings = settings
        self._path = path
        self._leaf = leaf
        self._feed = feed
        self._publisher = publisher
        self._changed = asyncio.Event()
        last = known.load(path)
        self._verifier = verifier
        verifier.restore(last.jwks, last.revoked)
        self.faults = Faults()
        self.intentions: Sequence[Intention] = ()
        """All of the mesh, for people to look at; each service follows those about itself."""
        names = {method.owner for method in contract.methods.values()}
        names |= {f"{method.owner}-http" for method in contract.methods.values() if method.bytes}
        self.follower = Follower(client, names, last.catalog, self._changed.set)

    async def check(self) -> None:
        """Raise until there is something to serve."""
        if not self._publisher.published:
            raise NotReadYet("What runs has not been read yet.")

    async def run(self) -> None:
        """Publish for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.follower.run())
            group.create_task(self._follow_faults())
            group.create_task(self._follow_identity())
            group.create_task(self._follow_intentions())
            group.create_task(self._expire())
            await self.follower.complete.wait()
            while True:
                self._changed.clear()
                await self._publish(
                    Known(self.follower.catalog, self._verifier.jwks, self.faults.ailing, self._verifier.revoked)
                )
                await asyncio.sleep(CALM_SECONDS)
                await self._changed.wait()

    async def _follow_identity(self) -> None:
        async for state in self._feed.watch():
            if _usable(state.jwks):
                before = self._verifier.jwks, self._verifier.revoked.keys()
                self._verifier.take(state.jwks, state.revocations)
                if before != (self._verifier.jwks, self._verifier.revoked.keys()):
                    self._changed.set()

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_SECONDS)
            if self._verifier.forget():
                self._changed.set()

    async def _follow_faults(self) -> None:
        async for found in discovery.answers(self._client, partial(self._client.kv.get, FAULTS, recurse=True)):
            entries = [(each["Key"].removeprefix(FAULTS), each["Value"] or b"") for each in found or ()]
            faults = self.faults.after(entries)
            for service, refusal in faults.refused.items():
                if self.faults.refused.get(service) != refusal:
                    log.error("%s%s is refused, what held before stays: %s", FAULTS, service, refusal)
            if faults.ailing != self.faults.ailing:
                log.warning(
                    "injected faults have changed",
                    extra={"faults": {k: v.model_dump() for k, v in faults.ailing.items()}},
                )
                self._changed.set()
            self.faults = faults

    async def _follow_intentions(self) -> None:
        async for found in discovery.answers(self._client, discovery.asking(self._client, ALL)):
            self.intentions = from_consul(found)

    async def _publish(self, present: Known) -> None:
        try:
            named = self._leaf.spiffe_id
            clients = snapshot.grpc_clients(
                present.catalog, self._contract, named, present.faults, self._settings.max_requests
            )
            envoy = edge.envoy(self._contract, self._image, present, self._settings, named)
        except ValueError:
            log.exception("what is known cannot be compiled; the last good snapshots stay")
            return
        self._publisher.publish(edge=envoy, clients=clients)
        log.info("published", extra={"instances": {name: len(found) for name, found in present.catalog.items()}})
        try:
            await asyncio.to_thread(known.save, self._path, present)
        except OSError:
            log.exception("what is known could not be kept; serving goes on")


def _usable(jwks: str) -> bool:
    try:
        jwt.PyJWKSet.from_json(jwks)
    except (jwt.PyJWTError, ValueError) as error:
        log.warning("the identity feed sent keys that cannot be used; the last good ones stay: %s", error)
        return False
    return True
