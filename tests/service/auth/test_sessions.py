import asyncio
from datetime import timedelta

import pytest
from atelier.auth.v1 import auth_pb2 as pb
from atelier.user.v1 import user_pb2
from sqlalchemy import exists, func, insert, select

from mesh import lock
from mesh.errors import PermissionDenied, Unauthenticated, Unavailable
from mesh.identity import Verifier
from services.auth import repository
from services.auth.domain import FORGET
from services.auth.tables import lock_table, refresh_token
from services.auth.tables import session as session_table

SECOND, DAY = timedelta(seconds=1), timedelta(days=1)


async def refused(kind, call):
    with pytest.raises(kind) as refusal:
        await call
    return refusal.value


async def test_an_access_token_is_one_that_the_mesh_takes(home):
    tokens = await home.issued("usr_1", "ROLE_VIP")
    verifier = Verifier()
    verifier.take(await home.published())

    user = verifier.user(f"Bearer {tokens.access_token}")

    assert (user.user_id, user.role) == ("usr_1", "ROLE_VIP")
    assert user.expire_time == (home.clock.now() + timedelta(minutes=5)).replace(microsecond=0)
    assert tokens.expire_time.ToDatetime(user.expire_time.tzinfo) == user.expire_time


async def test_only_the_user_service_opens_sessions(home):
    refusal = await refused(
        PermissionDenied,
        home.stub(caller="media").IssueTokens(pb.IssueTokensRequest(user_id="usr_1", role="ROLE_ADMIN")),
    )

    assert refusal.metadata["caller"] == "media"


async def test_the_database_holds_no_refresh_token(home):
    tokens = await home.issued()

    async with home.sql.reading() as connection:
        stored = (await connection.execute(select(refresh_token.c.token_hash))).scalar_one()
    assert len(tokens.refresh_token) == 43  # 256 bits in base64
    assert len(stored) == 32
    assert tokens.refresh_token.encode() not in stored


async def test_a_refresh_gives_new_tokens_of_the_same_session_in_the_present_role(home):
    first = await home.issued()
    home.users.role = user_pb2.User.ROLE_VIP

    second = await home.refreshed(first.refresh_token)

    before, after = await home.claims(first.access_token), await home.claims(second.access_token)
    assert (after["sid"], after["sub"], after["role"]) == (before["sid"], "usr_1", "ROLE_VIP")
    assert after["jti"] != before["jti"]
    assert second.refresh_token != first.refresh_token


async def test_a_lost_answer_is_made_up_for(home):
    first = await home.issued()
    lost = await home.refreshed(first.refresh_token)
    home.clock.time += 30 * SECOND

    again = await home.refreshed(first.refresh_token)

    assert (await home.claims(again.access_token))["sid"] == (await home.claims(lost.access_token))["sid"]
    assert await home.refreshed(again.refresh_token)


async def test_two_refreshes_at_once_both_go_on(home):
    first = await home.issued()

    one, other = await asyncio.gather(*(home.refreshed(first.refresh_token) for _ in range(2)))

    assert await home.refreshed(one.refresh_token)
    assert await home.refreshed(other.refresh_token)


async def test_an_old_refresh_token_used_again_ends_the_session(home):
    first = await home.issued()
    second = await home.refreshed(first.refresh_token)
    home.clock.time += 31 * SECOND

    reuse = await refused(Unauthenticated, home.refreshed(first.refresh_token))
    newest = await refused(Unauthenticated, home.refreshed(second.refresh_token))

    session_id = (await home.claims(second.access_token))["sid"]
    assert (reuse.reason, reuse.metadata["session_id"]) == ("SESSION_REVOKED", session_id)
    assert (newest.reason, newest.metadata["session_id"]) == ("SESSION_REVOKED", session_id)


async def test_a_lost_answer_does_not_prolong_its_grace(home):
    first = await home.issued()
    await home.refreshed(first.refresh_token)
    home.clock.time += 20 * SECOND
    await home.refreshed(first.refresh_token)
    home.clock.time += 20 * SECOND

    refusal = await refused(Unauthenticated, home.refreshed(first.refresh_token))

    assert refusal.reason == "SESSION_REVOKED"


async def test_a_refresh_token_lives_thirty_days(home):
    first = await home.issued()
    home.clock.time += 30 * DAY - SECOND
    second = await home.refreshed(first.refresh_token)
    home.clock.time += 30 * DAY

    refusal = await refused(Unauthenticated, home.refreshed(second.refresh_token))

    assert refusal.reason == "REFRESH_TOKEN_INVALID"


async def test_a_guessed_refresh_token_is_invalid(home):
    refusal = await refused(Unauthenticated, home.refreshed("guess"))

    assert refusal.reason == "REFRESH_TOKEN_INVALID"


async def test_a_disabled_account_is_not_refreshed(home):
    tokens = await home.issued()
    home.users.status = user_pb2.User.STATUS_DISABLED

    refusal = await refused(PermissionDenied, home.refreshed(tokens.refresh_token))

    assert (refusal.reason, refusal.metadata["user_id"]) == ("ACCOUNT_DISABLED", "usr_1")


async def test_a_refresh_while_user_is_away_costs_no_token(home):
    tokens = await home.issued()
    home.users.failure = Unavailable("away", retry_after_seconds=3)

    refusal = await refused(Unavailable, home.refreshed(tokens.refresh_token))
    home.users.failure = None
    home.clock.time += 3600 * SECOND

    assert refusal.retry_after_seconds == 3
    assert await home.refreshed(tokens.refresh_token)


async def test_a_revoked_session_is_not_refreshed(home):
    tokens = await home.issued()

    await home.revoke(tokens.refresh_token)
    await home.revoke(tokens.refresh_token)

    refusal = await refused(Unauthenticated, home.refreshed(tokens.refresh_token))
    assert (refusal.reason, refusal.metadata["session_id"]) == (
        "SESSION_REVOKED", (await home.claims(tokens.access_token))["sid"],
    )  # fmt: skip


async def test_revoking_one_session_leaves_the_others(home):
    here, there = await home.issued(), await home.issued()

    await home.revoke(here.refresh_token)

    assert await home.refreshed(there.refresh_token)


async def test_revoking_all_sessions_ends_those_of_that_user_only(home):
    here, there, another = await home.issued(), await home.issued(), await home.issued("usr_2")

    await home.revoke(here.refresh_token, all_sessions=True)

    assert (await refused(Unauthenticated, home.refreshed(there.refresh_token))).reason == "SESSION_REVOKED"
    assert await home.refreshed(another.refresh_token)


async def test_all_sessions_of_who_signs_in_all_day_are_ended(home):
    tokens, now = await home.issued(), home.clock.now()
    many = [{"session_id": f"ses_{number}", "user_id": "usr_1", "create_time": now} for number in range(70_000)]
    async with home.sql.transaction() as connection:
        await connection.execute(insert(session_table), many)

    await home.revoke(tokens.refresh_token, all_sessions=True)

    async with home.sql.reading() as connection:
        assert not await connection.scalar(select(exists().where(session_table.c.revoke_time.is_(None))))


async def test_revoking_what_is_unknown_succeeds(home):
    await home.revoke("guess", all_sessions=True)


async def test_forgetting_many_drops_all_that_has_expired_and_no_session_in_use(home, monkeypatch):
    monkeypatch.setattr(repository, "FORGOTTEN_AT_ONCE", 2)
    for _ in range(5):
        used = await home.issued()
    home.clock.time += 29 * DAY
    present = await home.refreshed(used.refresh_token)
    home.clock.time += 2 * DAY

    async with home.sql.transaction() as connection:
        fence = await lock.draw(connection, lock_table, FORGET)
    await home.sessions.forget(home.clock.now(), fence)

    async with home.sql.reading() as connection:
        left = [
            (await connection.scalars(select(func.count()).select_from(each))).one()
            for each in (session_table, refresh_token)
        ]
    assert left == [1, 1]
    assert await home.refreshed(present.refresh_token)


async def test_forgetting_drops_only_what_has_expired(home):
    await home.issued("usr_1")
    home.clock.time += 29 * DAY
    kept = await home.issued("usr_2")
    home.clock.time += 2 * DAY

    async with home.sql.transaction() as connection:
        fence = await lock.draw(connection, lock_table, FORGET)
    await home.sessions.forget(home.clock.now(), fence)

    async with home.sql.reading() as connection:
        assert list((await connection.execute(select(session_table.c.user_id))).scalars()) == ["usr_2"]
    assert await home.refreshed(kept.refresh_token)
