"""What is revoked, and how long and to whom it is told."""

import asyncio
from datetime import timedelta

import jwt
import pytest
from atelier.auth.v1 import auth_pb2 as pb
from atelier.mesh.v1 import identity_pb2
from sqlalchemy import text

from mesh.errors import PermissionDenied, Unauthenticated
from mesh.identity import TokenInvalid, TokenRevoked, Verifier
from services.auth.domain import REFRESH_LIFE, REUSE_GRACE, REVOCATION_LIFE, RefreshToken, Revocation, Session
from services.auth.repository import SqlRevocations
from tests.databases import on_postgresql

SECOND = timedelta(seconds=1)


async def session_of(home, tokens):
    return (await home.claims(tokens.access_token))["sid"]


async def test_ending_a_session_revokes_its_access_tokens(home):
    tokens, other = await home.issued(), await home.issued()

    await home.revoke(tokens.refresh_token)
    await home.revoke(tokens.refresh_token)

    assert await home.revoked() == [("sid", await session_of(home, tokens))]
    verifier, told = Verifier(), await home.told()
    verifier.take(told.jwks, told.revocations)
    with pytest.raises(TokenRevoked):
        verifier.user(f"Bearer {tokens.access_token}")
    assert verifier.user(f"Bearer {other.access_token}")


async def test_ending_all_sessions_tells_of_those_only_that_may_have_a_valid_token(home):
    await home.issued()
    home.clock.time += REVOCATION_LIFE
    here, there, other = await home.issued(), await home.issued(), await home.issued("usr_2")

    await home.revoke(here.refresh_token, all_sessions=True)

    assert await home.revoked() == sorted([("sid", await session_of(home, each)) for each in (here, there)])
    assert await home.refreshed(other.refresh_token)


async def test_a_stolen_refresh_token_takes_the_access_tokens_with_it(home):
    tokens = await home.issued()
    await home.refreshed(tokens.refresh_token)
    home.clock.time += REUSE_GRACE + SECOND

    with pytest.raises(Unauthenticated):
        await home.refreshed(tokens.refresh_token)

    assert await home.revoked() == [("sid", await session_of(home, tokens))]


async def test_a_generation_is_revoked_however_often_that_is_asked_and_the_next_is_not(home):
    tokens = await home.issued("usr_1")
    request = pb.RevokeGenerationRequest(generation="usr_1/1")
    home.users.generation = 2

    await home.stub(caller="user").RevokeGeneration(request)
    await home.stub(caller="user").RevokeGeneration(request)

    assert await home.revoked() == [("gen", "usr_1/1")]
    assert (await home.claims(tokens.access_token))["gen"] == "usr_1/1"
    assert (await home.claims((await home.refreshed(tokens.refresh_token)).access_token))["gen"] == "usr_1/2"


async def test_only_the_user_service_revokes_generations(home):
    with pytest.raises(PermissionDenied):
        await home.stub(caller="media").RevokeGeneration(pb.RevokeGenerationRequest(generation="usr_1/1"))


async def test_a_revocation_lives_as_long_as_the_tokens_it_is_about(home):
    old, young = await home.issued(), await home.issued()
    await home.revoke(old.refresh_token)
    (told,) = (await home.told()).revocations
    home.clock.time += REVOCATION_LIFE

    await home.revoke(young.refresh_token)

    expire_time = told.expire_time.ToDatetime(home.clock.now().tzinfo)
    assert expire_time == home.clock.now()
    assert expire_time > old.expire_time.ToDatetime(home.clock.now().tzinfo)
    assert await home.revoked() == []  # the young one's token has expired, too: nothing to tell


async def test_the_feed_sends_what_is_revoked_at_once_and_then_what_is_new(home):
    first, second = await home.issued(), await home.issued()
    await home.revoke(first.refresh_token)
    await home.feed.refresh()
    feed = home.identity().WatchIdentity(identity_pb2.WatchIdentityRequest())
    at_once = [each.value for each in (await anext(feed)).revocations]

    await home.revoke(second.refresh_token)
    await home.feed.refresh()
    then = [each.value for each in (await anext(feed)).revocations]

    assert at_once == [await session_of(home, first)]
    assert then == [await session_of(home, second)]
    await feed.aclose()


async def test_another_replica_tells_of_it_within_a_second(home):
    _, feed = home.another_replica()
    (follow,) = feed.work()
    following = asyncio.create_task(follow())
    told = feed.watch()
    await anext(told)
    tokens = await home.issued()

    await home.revoke(tokens.refresh_token)

    async with asyncio.timeout(1):
        (revocation,) = (await anext(told)).revocations
    assert revocation.value == await session_of(home, tokens)
    following.cancel()


async def test_too_many_revocations_end_all_tokens_by_a_new_key_at_once_and_once(home):
    tokens = await home.issued()
    before = jwt.get_unverified_header(tokens.access_token)["kid"]
    now, revocations = home.clock.now(), SqlRevocations(home.sql)
    replicas = [home.another_replica(max_revocations=3) for _ in range(2)]
    for number in range(4):
        await revocations.add(Revocation("sid", f"ses_{number}", now + REVOCATION_LIFE), now)

    await asyncio.gather(*(feed.refresh() for _, feed in replicas))
    for keys, feed in replicas:
        await feed.refresh()
        kid = jwt.get_unverified_header(keys.signed({"sub": "usr_1"}))["kid"]
        assert kid != before
        assert keys.jwks.count("kid") == 1

    told = await home.told()
    assert (told.jwks, list(told.revocations)) == (replicas[0][0].jwks, [])
    verifier = Verifier()
    verifier.take(told.jwks, told.revocations)
    with pytest.raises(TokenInvalid):
        verifier.user(f"Bearer {tokens.access_token}")
    assert verifier.user(f"Bearer {(await home.refreshed(tokens.refresh_token)).access_token}")


async def test_a_revocation_that_comes_as_another_expires_is_told(home):
    revocations, now = SqlRevocations(home.sql), home.clock.now()
    await revocations.add(Revocation("sid", "ses_old", now + 10 * SECOND), now)
    await revocations.add(Revocation("sid", "ses_last", now + 400 * SECOND), now)
    await home.revoked()

    await revocations.add(Revocation("sid", "ses_new", now + 390 * SECOND), now + 20 * SECOND)

    assert await home.revoked() == [("sid", "ses_last"), ("sid", "ses_new")]


@on_postgresql
async def test_a_session_ended_during_a_refresh_takes_the_fresh_access_token_with_it(home):
    now = home.clock.now()
    session = Session("ses_1", "usr_1", now)
    old = RefreshToken(b"old", "ses_1", expire_time=now + REFRESH_LIFE - 3600 * SECOND)
    fresh = RefreshToken(b"fresh", "ses_1", expire_time=now + REFRESH_LIFE)
    await home.sessions.open(session, old)

    async with home.sql.transaction() as connection:
        # The exchange has looked at both rows when it comes to wait for this.
        await connection.execute(text("LOCK TABLE refresh_token IN SHARE MODE"))
        exchange = asyncio.create_task(home.sessions.exchange(b"old", fresh, now))
        await asyncio.wait([exchange], timeout=0.5)
        end = asyncio.create_task(home.sessions.revoke(session, now, all_sessions=True))
        await asyncio.wait([end], timeout=0.5)
    refusal, _ = await asyncio.gather(exchange, end, return_exceptions=True)

    assert refusal is not None or await home.revoked() == [("sid", "ses_1")]
