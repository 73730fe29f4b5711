"""What whoever checks access tokens must know, as this replica reads it from the database."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from atelier.mesh.v1 import identity_pb2

from mesh.service import Background, every
from services.auth import convert
from services.auth.domain import MAX_REVOCATIONS, Revocation, Revocations
from services.auth.keys import KeyRing

POLL_SECONDS = 0.25  # a revocation by any replica has a second to reach every edge

log = logging.getLogger(__name__)


class Feed:
    """Satisfies `mesh.identity.IdentityFeed`.

    Args:
        keys: by which tokens are believed.
        revocations: by which they are not.
        max_revocations: with more, all tokens end by a new key.
    """

    def __init__(self, keys: KeyRing, revocations: Revocations, *, max_revocations: int = MAX_REVOCATIONS) -> None:
        self._keys = keys
        self._revocations = revocations
        self._max_revocations = max_revocations
        self._version: object = None
        self._revoked: dict[tuple[str, str], Revocation] = {}
        self._told: object = None
        self._changed = asyncio.Event()

    def work(self) -> list[Background]:
        """Return what must run for ever."""
        return [every(POLL_SECONDS, self.refresh)]

    async def refresh(self) -> None:
        """Bring this replica up to date, once."""
        # Before the keys: whoever replaces those drops the revocations with them.
        await self._read()
        await self._keys.refresh()
        if len(self._revoked) > self._max_revocations:
            await self._read()  # another replica may have been quicker
        if len(self._revoked) > self._max_revocations:
            log.warning("%d revocations are too many: a new key ends all access tokens", len(self._revoked))
            await self._keys.replace()
            await self._read()
        if self._told != (self._keys.jwks, self._version):
            self._told = self._keys.jwks, self._version
            self._changed.set()
            self._changed = asyncio.Event()

    async def _read(self) -> None:
        version = await self._revocations.version()
        if version != self._version:
            self._revoked = {(each.claim, each.value): each for each in await self._revocations.all()}
            self._version = version

    async def watch(self) -> AsyncIterator[identity_pb2.WatchIdentityResponse]:
        jwks, revoked = "", dict[tuple[str, str], Revocation]()
        while True:
            changed = self._changed
            news = [each for what, each in self._revoked.items() if what not in revoked]
            if self._keys.jwks != jwks or (jwks and news):
                jwks, revoked = self._keys.jwks, self._revoked
                yield identity_pb2.WatchIdentityResponse(jwks=jwks, revocations=map(convert.revocation_to_proto, news))
            else:
                await changed.wait()
