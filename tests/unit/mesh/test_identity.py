"""Which access tokens are believed."""

from __future__ import annotations

import hmac
import json
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import jwt
import pytest
from atelier.mesh.v1 import identity_pb2
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from mesh.context import TokenMissing
from mesh.identity import (
    LEEWAY_SECONDS,
    KeysUnknown,
    TokenExpired,
    TokenInvalid,
    TokenRevoked,
    Verifier,
)
from tests.eventually import eventually

KEY, OTHER_KEY = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))


def jwks(**keys: ec.EllipticCurvePrivateKey) -> str:
    return json.dumps(
        {"keys": [{**json.loads(ECAlgorithm.to_jwk(key.public_key())), "kid": kid} for kid, key in keys.items()]}
    )


def claims(lives_seconds: float = 300, **changed: object) -> dict[str, object]:
    now = int(time.time())
    right = {
        "iss": "atelier", "aud": "atelier", "sub": "usr_1", "jti": "jti_1", "sid": "ses_1",
        "gen": "usr_1/1", "role": "ROLE_USER", "iat": now, "exp": int(now + lives_seconds),
    }  # fmt: skip
    return {name: value for name, value in {**right, **changed}.items() if value is not None}


def bearer(key: object = KEY, algorithm: str = "ES256", kid: str | None = "k1", **changed: object) -> str:
    return f"Bearer {jwt.encode(claims(**changed), key, algorithm, headers={'kid': kid} if kid else None)}"


def encoded(part: bytes) -> bytes:
    return urlsafe_b64encode(part).rstrip(b"=")


@pytest.fixture
def verifier() -> Verifier:
    made = Verifier()
    made.take(jwks(k1=KEY))
    return made


def test_a_good_token_names_its_user(verifier: Verifier) -> None:
    header = bearer(role="ROLE_ADMIN")

    user = verifier.user(header)

    assert (user.user_id, user.role, user.session_id) == ("usr_1", "ROLE_ADMIN", "ses_1")
    assert user.token == header.removeprefix("Bearer ")
    assert timedelta(seconds=290) < user.expire_time - datetime.now(UTC) <= timedelta(seconds=300)


def test_the_scheme_is_read_in_any_case(verifier: Verifier) -> None:
    assert verifier.user(bearer().replace("Bearer", "bEARER")).user_id == "usr_1"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic dXNyOnB3", "eyJhbGciOiJFUzI1NiJ9"])
def test_without_a_bearer_token_nobody_is_signed_in(verifier: Verifier, header) -> None:
    with pytest.raises(TokenMissing):
        verifier.user(header)


def test_an_old_token_is_told_to_be_refreshed(verifier: Verifier) -> None:
    with pytest.raises(TokenExpired):
        verifier.user(bearer(lives_seconds=-LEEWAY_SECONDS - 1))


def test_clocks_may_differ_by_the_leeway(verifier: Verifier) -> None:
    assert verifier.user(bearer(lives_seconds=-LEEWAY_SECONDS + 2)).user_id == "usr_1"


async def test_a_token_that_was_believed_is_refused_once_it_has_expired(verifier: Verifier) -> None:
    header = bearer(lives_seconds=-LEEWAY_SECONDS + 1)  # within the leeway for less than a second
    verifier.user(header)

    def expired() -> bool:
        try:
            return verifier.user(header) is None
        except TokenExpired:
            return True

    await eventually(expired, within_seconds=3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"iss": "someone"}, {"iss": None}, {"aud": "another"}, {"aud": None}, {"sub": None}, {"exp": None},
        {"iat": None}, {"jti": None}, {"sid": None}, {"gen": None}, {"role": None}, {"sub": 7}, {"exp": "soon"},
        {"nbf": 4_000_000_000}, {"kid": "k2"}, {"kid": None}, {"kid": ""}, {"key": OTHER_KEY},
        {"key": None, "algorithm": "none"},
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_token_that_is_not_wholly_ours_is_refused(verifier: Verifier, wrong) -> None:
    with pytest.raises(TokenInvalid):
        verifier.user(bearer(**wrong))


def test_the_public_key_is_no_shared_secret(verifier: Verifier) -> None:
    public = KEY.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )  # fmt: skip
    # By hand: PyJWT refuses to sign with a public key, a forger's library does not.
    signed = b".".join(encoded(json.dumps(part).encode()) for part in ({"alg": "HS256", "kid": "k1"}, claims()))
    signature = encoded(hmac.digest(public, signed, "sha256"))

    with pytest.raises(TokenInvalid):
        verifier.user(f"Bearer {signed.decode()}.{signature.decode()}")


@pytest.mark.parametrize("token", ["x", "a.b.c", "....", "eyJ.eyJ.eyJ", "\u00fc\u00fc", "W10.e30.AAAA", "a b"])
def test_what_is_no_token_at_all_is_refused(verifier: Verifier, token) -> None:
    with pytest.raises(TokenInvalid):
        verifier.user(f"Bearer {token}")


def test_a_token_whose_claims_were_changed_is_refused(verifier: Verifier) -> None:
    head, _, signature = bearer().split(".")
    _, changed, _ = bearer(role="ROLE_ADMIN").split(".")

    with pytest.raises(TokenInvalid):
        verifier.user(f"{head}.{changed}.{signature}")


def test_a_new_key_is_believed_beside_the_old_one(verifier: Verifier) -> None:
    verifier.take(jwks(k1=KEY, k2=OTHER_KEY))

    assert verifier.user(bearer()).user_id == "usr_1"
    assert verifier.user(bearer(OTHER_KEY, kid="k2")).user_id == "usr_1"


def test_a_withdrawn_keys_tokens_are_refused_though_they_were_believed(verifier: Verifier) -> None:
    header = bearer()
    verifier.user(header)

    verifier.take(jwks(k2=OTHER_KEY))

    with pytest.raises(TokenInvalid):
        verifier.user(header)


def test_a_token_is_verified_once(verifier: Verifier) -> None:
    header = bearer()

    assert verifier.user(header) is verifier.user(header)


def test_the_cache_is_bounded(verifier: Verifier) -> None:
    assert verifier._users.maxsize == 10_000


async def test_before_the_first_keys_it_is_not_the_tokens_fault() -> None:
    verifier = Verifier()

    with pytest.raises(KeysUnknown) as refused:
        verifier.user(bearer())
    with pytest.raises(KeysUnknown):
        await verifier.check()

    assert (refused.value.code, refused.value.retry_after_seconds) == ("UNAVAILABLE", 1)


FIRST, SECOND = jwks(k1=KEY), jwks(k2=OTHER_KEY)


def revocation(claim: str, value: str, lives_seconds: float = 300) -> identity_pb2.Revocation:
    made = identity_pb2.Revocation(claim=claim, value=value)
    made.expire_time.FromSeconds(int(time.time() + lives_seconds))
    return made


REVOCATIONS = pytest.mark.parametrize(("claim", "value"), [("jti", "jti_1"), ("sid", "ses_1"), ("gen", "usr_1/1")])


@REVOCATIONS
def test_a_revoked_token_is_refused_though_it_was_believed(verifier: Verifier, claim: str, value: str) -> None:
    header = bearer()
    verifier.user(header)

    verifier.take(FIRST, [revocation(claim, value)])

    with pytest.raises(TokenRevoked):
        verifier.user(header)
    with pytest.raises(TokenRevoked):
        verifier.user(bearer())


@pytest.mark.parametrize(("claim", "value"), [("jti", "ses_1"), ("sid", "ses_2"), ("gen", "usr_1/2"), ("sub", "usr_1")])
def test_only_what_is_revoked_is_refused(verifier: Verifier, claim: str, value: str) -> None:
    verifier.take(FIRST, [revocation(claim, value)])

    assert verifier.user(bearer()).user_id == "usr_1"


def test_what_was_revoked_stays_so_when_the_feed_begins_anew(verifier: Verifier) -> None:
    verifier.take(FIRST, [revocation("sid", "ses_1")])

    verifier.take(jwks(k1=KEY, k2=OTHER_KEY), [])

    with pytest.raises(TokenRevoked):
        verifier.user(bearer())


def test_a_revocation_is_forgotten_when_no_token_can_say_it_any_more(verifier: Verifier) -> None:
    verifier.take(FIRST, [revocation("sid", "ses_1", lives_seconds=-1), revocation("sid", "ses_2")])

    assert list(verifier.revoked) == [("sid", "ses_2")]
    assert not verifier.forget()


def test_revocations_are_forgotten_with_all_the_keys_whose_tokens_they_were_about(verifier: Verifier) -> None:
    verifier.take(FIRST, [revocation("sid", "ses_1")])

    verifier.take(SECOND, [revocation("sid", "ses_2")])

    assert list(verifier.revoked) == [("sid", "ses_2")]


class Feed:
    """Satisfies mesh.identity.IdentityFeed."""

    def __init__(self, *states: identity_pb2.WatchIdentityResponse) -> None:
        self._states = states

    async def watch(self) -> AsyncIterator[identity_pb2.WatchIdentityResponse]:
        for state in self._states:
            yield state


async def test_keys_follow_their_feed() -> None:
    verifier = Verifier()

    await verifier.follow(Feed(*(identity_pb2.WatchIdentityResponse(jwks=each) for each in (FIRST, SECOND))))

    await verifier.check()
    assert verifier.user(bearer(OTHER_KEY, kid="k2")).user_id == "usr_1"
    with pytest.raises(TokenInvalid):
        verifier.user(bearer())
