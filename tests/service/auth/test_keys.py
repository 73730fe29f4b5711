import asyncio
import json
import stat
from datetime import timedelta

import jwt
import pytest
from atelier.auth.v1 import auth_pb2
from atelier.mesh.v1 import identity_pb2

from mesh import database
from mesh.errors import PermissionDenied
from services.auth.domain import ACCESS_LIFE, KEY_LEAD, KEY_LIFE, VERIFIER_SKEW
from services.auth.keys import KeyRing
from services.auth.repository import SqlKeys
from tests.databases import on_sqlite
from tests.held_clock import HeldClock

SECOND = timedelta(seconds=1)


def key_id(tokens):
    return jwt.get_unverified_header(tokens.access_token)["kid"]


def key_ids(jwks):
    return [key["kid"] for key in json.loads(jwks)["keys"]]


async def test_a_new_key_is_published_at_once_and_signs_after_a_minute(home):
    first = key_id(await home.issued())

    new = await home.rotate()

    assert key_ids(await home.published()) == [first, new.key_id]
    await home.pass_time(KEY_LEAD - SECOND)
    assert key_id(await home.issued()) == first
    await home.pass_time(SECOND)
    assert key_id(await home.issued()) == new.key_id
    assert new.sign_time.ToDatetime(home.clock.now().tzinfo) == home.clock.now()


async def test_the_old_key_stays_until_its_last_token_has_expired(home):
    new = await home.rotate()
    await home.pass_time(KEY_LEAD - SECOND)
    last = await home.issued()
    await home.pass_time(SECOND + ACCESS_LIFE + VERIFIER_SKEW - SECOND)

    before = key_ids(await home.published())
    await home.pass_time(SECOND)

    assert before == [key_id(last), new.key_id]
    assert key_ids(await home.published()) == [new.key_id]


async def test_rotating_twice_within_a_minute_makes_one_key(home):
    answers = await asyncio.gather(*(home.rotate() for _ in range(5)))

    assert len({answer.key_id for answer in answers}) == 1
    assert len(key_ids(await home.published())) == 2


async def test_a_key_is_replaced_by_itself_when_it_has_served_its_time(home):
    first = key_id(await home.issued())
    await home.pass_time(KEY_LIFE - SECOND)
    before = key_ids(await home.published())

    await home.pass_time(SECOND)

    assert before == [first]
    assert key_ids(await home.published())[0] == first
    assert len(key_ids(await home.published())) == 2


async def test_replicas_that_start_together_make_one_key(new_database):
    url, clock = await new_database("auth"), HeldClock()
    async with database.opened(url) as one, database.opened(url) as other:
        rings = [KeyRing(SqlKeys(sql), clock) for sql in (one, other)]

        await asyncio.gather(*(ring.refresh() for ring in rings))

        published = [key_ids(ring.jwks) for ring in rings]
    assert published[0] == published[1]
    assert len(published[0]) == 1


async def test_another_replica_signs_with_the_same_keys(home):
    other, _ = home.another_replica()
    new = await home.rotate()

    await other.refresh()

    assert key_ids(other.jwks) == key_ids(await home.published())
    home.clock.time += KEY_LEAD
    assert jwt.get_unverified_header(other.signed({"sub": "usr_1"}))["kid"] == new.key_id


async def test_the_feed_sends_the_keys_at_once_and_at_every_change(home):
    feed = home.identity().WatchIdentity(identity_pb2.WatchIdentityRequest())
    first = (await anext(feed)).jwks

    new = await home.rotate()
    await home.feed.refresh()
    second = (await anext(feed)).jwks

    assert key_ids(second) == [*key_ids(first), new.key_id]
    await feed.aclose()


async def test_the_feed_holds_public_keys_only(home):
    (key,) = json.loads(await home.published())["keys"]

    assert set(key) == {"kty", "crv", "x", "y", "kid", "alg", "use"}
    assert (key["kty"], key["crv"], key["alg"]) == ("EC", "P-256", "ES256")


async def test_the_feed_is_not_for_people(home):
    with pytest.raises(PermissionDenied) as refusal:
        await anext(home.identity(caller="edge").WatchIdentity(identity_pb2.WatchIdentityRequest()))

    assert refusal.value.metadata["caller"] == "edge"


async def test_only_administrators_rotate_keys(home):
    with pytest.raises(PermissionDenied) as refusal:
        await home.stub("usr_1").RotateKeys(auth_pb2.RotateKeysRequest())

    assert refusal.value.reason == "ROLE_REQUIRED"


@on_sqlite
async def test_the_private_keys_are_readable_by_their_owner_only(home, tmp_path):
    assert stat.S_IMODE((tmp_path / "auth.db").stat().st_mode) == 0o600
