"""The signing keys: made, shared by the database, rotated, published as JSON Web Keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from jwt.algorithms import ECAlgorithm

from mesh import ids
from mesh.clock import Clock
from mesh.errors import Unavailable
from mesh.identity import ALGORITHM, AUDIENCE, ISSUER
from services.auth.domain import Keys, SigningKey, awaited, due, next_place, published, signing


class KeyRing:
    """The keys as this replica knows them. Satisfies `domain.Signer`."""

    def __init__(self, keys: Keys, clock: Clock) -> None:
        self._keys = keys
        self._clock = clock
        self._known: list[SigningKey] = []
        self.jwks = ""
        """The published keys as a JSON Web Key Set; empty before the first `refresh`."""

    async def refresh(self) -> None:
        """Bring this replica up to date; make the first key, and a new one when the newest has served its time."""
        now = self._clock.now()
        known = await self._keys.all()
        if due(known, now):
            await self._keys.add(self._new(known))
            known = await self._keys.all()  # another replica's, if it was quicker
        kept = published(known, now)
        if len(kept) < len(known):
            await self._keys.drop([key.key_id for key in known if key not in kept])
        if kept != self._known:
            self._known = kept
            self.jwks = json.dumps({"keys": [_public(key) for key in kept]})

    async def rotate(self) -> SigningKey:
        await self.refresh()
        if awaited(self._known, self._clock.now()) is None:
            await self._keys.add(self._new(self._known))
            await self.refresh()
        return awaited(self._known, self._clock.now()) or self._known[-1]

    async def replace(self) -> None:
        """Have a new key sign at once, and withdraw all others with every token that they signed."""
        await self._keys.replace(replace(self._new(self._known), sign_time=self._clock.now()))
        await self.refresh()

    def signed(self, claims: Mapping[str, str | int]) -> str:
        """Return a token that says `claims`, and by whom and for whom it is.

        Raises:
            Unavailable: the keys have not been read yet.
        """
        if not self._known:
            raise Unavailable("The signing keys are not there yet. Try again.", retry_after_seconds=1)
        key = signing(self._known, self._clock.now())
        claims = {"iss": ISSUER, "aud": AUDIENCE, **claims}
        return jwt.encode(claims, _private(key), algorithm=ALGORITHM, headers={"kid": key.key_id})

    def _new(self, known: list[SigningKey]) -> SigningKey:
        private = generate_private_key(SECP256R1())
        number, sign_time = next_place(known, self._clock.now())
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        return SigningKey(key_id=ids.new("key"), number=number, private_pem=pem, sign_time=sign_time)


def _private(key: SigningKey) -> EllipticCurvePrivateKey:
    private = load_pem_private_key(key.private_pem.encode(), password=None)
    if not isinstance(private, EllipticCurvePrivateKey):
        raise TypeError(f"the signing key {key.key_id} is not an EC key")
    return private


def _public(key: SigningKey) -> dict[str, str]:
    point = json.loads(ECAlgorithm.to_jwk(_private(key).public_key()))
    return {**point, "kid": key.key_id, "alg": ALGORITHM, "use": "sig"}
