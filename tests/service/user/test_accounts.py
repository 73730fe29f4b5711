import asyncio
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from atelier.user.v1 import user_pb2 as pb
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import insert, select

from mesh import idempotency, inbox, lock
from mesh.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    MeshError,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from services.user.domain import FORGET, Role, Status
from services.user.tables import account, idempotency_table, inbox_table, lock_table
from tests.databases import are_waiting, on_postgresql
from tests.eventually import eventually

pytestmark = pytest.mark.usefixtures("home")


def registration(**changes):
    return pb.RegisterUserRequest(
        **{"username": "Ada", "email": "Ada@Example.com", "password": "correct horse"} | changes
    )


async def login(home, name, password="correct horse"):
    return await home.stub().Login(pb.LoginRequest(login=name, password=password))


async def refused(kind, call):
    with pytest.raises(kind) as refusal:
        await call
    return refusal.value


async def test_a_new_account_is_a_user_s_with_the_limits_of_one(home):
    user = await home.stub().RegisterUser(registration())

    assert re.fullmatch("usr_[0-9a-v]+", user.user_id)
    assert (user.username, user.email, user.role, user.status, user.etag) == (
        "Ada", "Ada@example.com", pb.User.ROLE_USER, pb.User.STATUS_ACTIVE, "1",
    )  # fmt: skip
    assert (user.quota.tasks.limit, user.quota.storage_bytes.limit) == (100, 1024**3)
    assert user.quota.reset_time.ToJsonString() == "2026-11-01T00:00:00Z"
    assert user.create_time.ToDatetime() == home.clock.now().replace(tzinfo=None)


async def test_a_name_is_taken_whatever_its_case(home):
    await home.stub().RegisterUser(registration())

    refusal = await refused(
        AlreadyExists, home.stub().RegisterUser(registration(username="aDA", email="b@example.com"))
    )

    assert (refusal.reason, refusal.metadata["field"]) == ("USERNAME_TAKEN", "username")


async def test_an_address_is_taken_whatever_its_case(home):
    await home.stub().RegisterUser(registration())

    refusal = await refused(
        AlreadyExists, home.stub().RegisterUser(registration(username="bob", email="aDA@example.COM"))
    )

    assert (refusal.reason, refusal.metadata["field"]) == ("EMAIL_TAKEN", "email")


async def test_of_many_who_want_a_name_at_once_one_gets_it(home):
    outcomes = await asyncio.gather(
        *(home.stub().RegisterUser(registration(email=f"{number}@example.com")) for number in range(10)),
        return_exceptions=True,
    )

    assert sum(isinstance(outcome, pb.User) for outcome in outcomes) == 1
    assert {outcome.reason for outcome in outcomes if isinstance(outcome, MeshError)} == {"USERNAME_TAKEN"}


async def test_what_is_no_address_is_refused(home):
    refusal = await refused(InvalidArgument, home.stub().RegisterUser(registration(email="ada at example.com")))

    assert (refusal.reason, refusal.metadata["email"]) == ("EMAIL_MALFORMED", "ada at example.com")


async def test_a_password_that_is_the_address_is_refused(home):
    refusal = await refused(InvalidArgument, home.stub().RegisterUser(registration(password="ada@example.com")))

    assert (refusal.reason, set(refusal.violations)) == ("PASSWORD_TOO_WEAK", {"password"})


async def test_a_short_password_is_refused_by_the_contract(home):
    refusal = await refused(InvalidArgument, home.stub().RegisterUser(registration(password="short")))

    assert refusal.metadata["field"] == "password"


async def test_a_repeated_registration_answers_the_first_one_s_account(home):
    request = registration(request_id="r1")

    users = await asyncio.gather(*(home.stub().RegisterUser(request) for _ in range(10)))

    assert len({user.user_id for user in users}) == 1


async def test_a_request_id_belongs_to_one_registration(home):
    await home.stub().RegisterUser(registration(request_id="r1"))

    refusal = await refused(
        FailedPrecondition, home.stub().RegisterUser(registration(email="other@example.com", request_id="r1"))
    )

    assert (refusal.reason, refusal.metadata["request_id"]) == ("IDEMPOTENCY_KEY_REUSED", "r1")


async def test_strangers_with_the_same_request_id_do_not_meet(home):
    ada = await home.stub().RegisterUser(registration(request_id="r1"))

    bob = await home.stub().RegisterUser(registration(username="bob", email="bob@example.com", request_id="r1"))

    assert ada.user_id != bob.user_id


async def test_who_repeats_a_registration_must_know_its_password(home):
    await home.stub().RegisterUser(registration(request_id="r1"))

    refusal = await refused(
        FailedPrecondition, home.stub().RegisterUser(registration(password="battery staple", request_id="r1"))
    )

    assert (refusal.reason, refusal.metadata["request_id"]) == ("IDEMPOTENCY_KEY_REUSED", "r1")


@pytest.mark.parametrize("name", ["ada", "ADA", "ada@example.com", "ADA@EXAMPLE.COM"])
async def test_one_signs_in_by_name_or_address_whatever_its_case(home, name):
    user = await home.stub().RegisterUser(registration())

    answer = await login(home, name)

    assert (answer.access_token, answer.refresh_token, answer.user.user_id) == ("access", "refresh", user.user_id)
    assert home.auth.opened == [("user", user.user_id, "ROLE_USER")]


@pytest.mark.parametrize(("name", "password"), [("ada", "battery staple"), ("nobody", "correct horse"), ("@", "x")])
async def test_a_wrong_sign_in_does_not_tell_what_is_wrong(home, name, password):
    await home.registered("ada")

    refusal = await refused(Unauthenticated, login(home, name, password))

    assert (refusal.reason, refusal.message, refusal.metadata) == (
        "CREDENTIALS_INVALID", "Name or password is wrong.", {},
    )  # fmt: skip
    assert not home.auth.opened


async def test_a_disabled_account_cannot_sign_in(home):
    user = await home.registered("ada")
    await home.accounts.change(user.user_id, lambda account: replace(account, status=Status.DISABLED))

    refusal = await refused(PermissionDenied, login(home, "ada"))

    assert (refusal.reason, refusal.metadata["user_id"]) == ("ACCOUNT_DISABLED", user.user_id)


async def test_signing_in_is_unavailable_while_auth_is(home):
    await home.registered("ada")
    home.auth.failure = Unavailable("away", retry_after_seconds=2)

    refusal = await refused(Unavailable, login(home, "ada"))

    assert refusal.retry_after_seconds == 2


async def test_signing_in_renews_a_hash_with_old_parameters(home, old_hash):
    user = await home.registered("ada")
    await home.accounts.change(user.user_id, lambda account: replace(account, password_hash=old_hash))

    await login(home, "ada")

    renewed = (await home.accounts.get(user.user_id)).password_hash
    assert "m=19456,t=2,p=1" in renewed
    await login(home, "ada")
    assert (await home.accounts.get(user.user_id)).password_hash == renewed


@pytest.mark.parametrize("own_name", [True, False])
async def test_one_reads_one_s_own_account(home, own_name):
    user = await home.registered("ada")

    read = await home.stub(user.user_id).GetUser(pb.GetUserRequest(user_id=user.user_id if own_name else "me"))

    assert read == user


async def test_another_s_account_is_as_missing_as_none(home):
    ada, bob = await home.registered("ada"), await home.registered("bob")

    others = await refused(NotFound, home.stub(ada.user_id).GetUser(pb.GetUserRequest(user_id=bob.user_id)))
    none = await refused(NotFound, home.stub(ada.user_id).GetUser(pb.GetUserRequest(user_id="usr_none")))

    assert (others.reason, others.metadata["user_id"]) == ("USER_NOT_FOUND", bob.user_id)
    assert (none.reason, none.message.replace("usr_none", bob.user_id)) == (others.reason, others.message)


async def test_an_administrator_reads_any_account(home):
    bob = await home.registered("bob")

    read = await home.stub("usr_admin", "ROLE_ADMIN").GetUser(pb.GetUserRequest(user_id=bob.user_id))

    assert read == bob


async def test_an_update_changes_what_its_mask_names(home):
    ada = await home.registered("ada")

    changed = await home.stub(ada.user_id).UpdateUser(
        pb.UpdateUserRequest(
            user=pb.User(user_id="me", display_name="Ada L.", email="ignored@example.com"),
            update_mask=FieldMask(paths=["displayName"]),
        )
    )

    assert (changed.display_name, changed.email, changed.etag) == ("Ada L.", ada.email, "2")


async def test_an_update_without_a_mask_changes_what_is_set(home):
    ada = await home.registered("ada")

    changed = await home.stub(ada.user_id).UpdateUser(
        pb.UpdateUserRequest(user=pb.User(user_id="me", email="Ada@Example.ORG", role=pb.User.ROLE_ADMIN))
    )

    assert (changed.email, changed.role) == ("Ada@example.org", pb.User.ROLE_USER)
    assert (await login(home, "ada@example.org")).user.user_id == ada.user_id


async def test_a_mask_empties_a_field(home):
    ada = await home.registered("ada")
    stub = home.stub(ada.user_id)
    await stub.UpdateUser(pb.UpdateUserRequest(user=pb.User(user_id="me", display_name="Ada L.")))

    changed = await stub.UpdateUser(
        pb.UpdateUserRequest(user=pb.User(user_id="me"), update_mask=FieldMask(paths=["display_name"]))
    )

    assert changed.display_name == ""


async def test_a_role_is_not_for_its_owner_to_change(home):
    ada = await home.registered("ada")

    refusal = await refused(
        InvalidArgument,
        home.stub(ada.user_id).UpdateUser(
            pb.UpdateUserRequest(
                user=pb.User(user_id="me", role=pb.User.ROLE_ADMIN), update_mask=FieldMask(paths=["role"])
            )
        ),
    )

    assert (refusal.reason, refusal.metadata["field"]) == ("FIELD_NOT_UPDATABLE", "role")


async def test_an_update_of_an_old_version_is_refused(home):
    ada = await home.registered("ada")
    update = pb.UpdateUserRequest(user=pb.User(user_id="me", display_name="A", etag=ada.etag))
    await home.stub(ada.user_id).UpdateUser(update)

    refusal = await refused(Aborted, home.stub(ada.user_id).UpdateUser(update))

    assert (refusal.reason, refusal.metadata["etag"]) == ("ETAG_MISMATCH", "2")


async def test_an_update_cannot_take_another_s_address(home):
    ada = await home.registered("ada")
    await home.registered("bob")

    refusal = await refused(
        AlreadyExists,
        home.stub(ada.user_id).UpdateUser(pb.UpdateUserRequest(user=pb.User(user_id="me", email="BOB@example.com"))),
    )

    assert (refusal.reason, refusal.metadata["field"]) == ("EMAIL_TAKEN", "email")


async def test_permissions_follow_the_role(home):
    ada = await home.registered("ada")

    answers = [
        (await home.stub(ada.user_id).CheckPermission(pb.CheckPermissionRequest(user_id="me", permission=name))).allowed
        for name in ("tasks.create", "users.administer")
    ]

    assert answers == [True, False]


async def test_an_unknown_permission_is_refused(home):
    ada = await home.registered("ada")

    refusal = await refused(
        InvalidArgument,
        home.stub(ada.user_id).CheckPermission(pb.CheckPermissionRequest(user_id="me", permission="moon.land")),
    )

    assert (refusal.reason, refusal.metadata["permission"]) == ("PERMISSION_UNKNOWN", "moon.land")


async def test_an_administrator_sets_role_and_status(home):
    ada = await home.registered("ada")
    admin = home.stub("usr_admin", "ROLE_ADMIN")

    await admin.SetRole(pb.SetRoleRequest(user_id=ada.user_id, role=pb.User.ROLE_VIP))
    changed = await admin.SetRole(pb.SetRoleRequest(user_id=ada.user_id, status=pb.User.STATUS_DISABLED))

    assert (changed.role, changed.status) == (pb.User.ROLE_VIP, pb.User.STATUS_DISABLED)
    assert changed.quota.tasks.limit == 5_000


async def test_a_change_of_role_or_status_has_tokens_of_before_revoked_once(home):
    ada = await home.registered("ada")
    admin = home.stub("usr_admin", "ROLE_ADMIN")
    vip = pb.SetRoleRequest(user_id=ada.user_id, role=pb.User.ROLE_VIP)
    disabled = pb.SetRoleRequest(user_id=ada.user_id, status=pb.User.STATUS_DISABLED)

    for request in (vip, vip, disabled):
        await admin.SetRole(request)
    await home.stub(ada.user_id).UpdateUser(
        pb.UpdateUserRequest(user=pb.User(user_id="me", display_name="Ada"), update_mask={"paths": ["display_name"]})
    )
    await home.upkeep.revoke()
    await home.upkeep.revoke()

    assert sorted(home.auth.revoked) == [f"{ada.user_id}/1", f"{ada.user_id}/2"]
    account = await home.stub(caller="auth").GetAccount(pb.GetAccountRequest(user_id=ada.user_id))
    assert account.generation == f"{ada.user_id}/3"


async def test_a_change_while_auth_is_away_is_told_when_it_is_back(home):
    ada = await home.registered("ada")
    home.auth.failure = Unavailable("away")
    await home.stub("usr_admin", "ROLE_ADMIN").SetRole(
        pb.SetRoleRequest(user_id=ada.user_id, status=pb.User.STATUS_DISABLED)
    )
    await home.upkeep.revoke()

    home.auth.failure = None
    await home.upkeep.revoke()

    assert home.auth.revoked == [f"{ada.user_id}/1"]


async def test_one_that_can_never_be_revoked_holds_up_no_other(home):
    users = [await home.registered(name) for name in ("ada", "ben")]
    for user in users:
        await home.stub().GrantAdmin(pb.GrantAdminRequest(login=user.username, secret="5ecret"))
    first, second = await home.accounts.ended_generations()
    home.auth.refused = first

    for _ in range(60):  # in half of them the other one comes first
        await home.upkeep.revoke()

    assert home.auth.revoked == [second]
    assert await home.accounts.ended_generations() == [first]


async def test_what_is_not_revoked_yet_is_still_to_be_when_another_is(home):
    ada, ben = await home.registered("ada"), await home.registered("ben")
    for login in ("ada", "ben"):
        await home.stub().GrantAdmin(pb.GrantAdminRequest(login=login, secret="5ecret"))

    await home.accounts.note_revoked(f"{ada.user_id}/1")

    assert await home.accounts.ended_generations() == [f"{ben.user_id}/1"]


@on_postgresql
async def test_of_two_changes_at_once_neither_is_lost(home):
    ada = await home.registered("ada")

    async with home.sql.transaction() as connection:
        await connection.execute(select(account).with_for_update())
        changes = [
            asyncio.create_task(home.accounts.change(ada.user_id, partial(replace, **change)))
            for change in ({"role": Role.VIP}, {"display_name": "Ada"})
        ]
        await eventually(lambda: are_waiting(home.sql, 2))
    await asyncio.gather(*changes)

    changed = await home.accounts.get(ada.user_id)
    assert (changed.role, changed.display_name, changed.version) == (Role.VIP, "Ada", 3)


async def test_a_login_names_the_generation_whose_role_it_gives(home):
    ada = await home.registered("ada")
    await home.stub().GrantAdmin(pb.GrantAdminRequest(login="ada", secret="5ecret"))

    await home.stub().Login(pb.LoginRequest(login="ada", password="correct horse"))

    assert home.auth.generations == [f"{ada.user_id}/2"]


async def test_a_user_sets_no_roles(home):
    ada = await home.registered("ada")

    refusal = await refused(
        PermissionDenied,
        home.stub(ada.user_id).SetRole(pb.SetRoleRequest(user_id=ada.user_id, role=pb.User.ROLE_ADMIN)),
    )

    assert refusal.reason == "ROLE_REQUIRED"


async def test_the_installation_s_secret_makes_an_administrator(home):
    await home.registered("ada")

    changed = await home.stub().GrantAdmin(pb.GrantAdminRequest(login="ADA@example.com", secret="5ecret"))

    assert changed.role == pb.User.ROLE_ADMIN


async def test_a_wrong_secret_makes_nobody_anything(home):
    ada = await home.registered("ada")

    refusal = await refused(PermissionDenied, home.stub().GrantAdmin(pb.GrantAdminRequest(login="ada", secret="guess")))

    assert refusal.reason == "SECRET_INVALID"
    assert (await home.stub(ada.user_id).GetUser(pb.GetUserRequest(user_id="me"))).role == pb.User.ROLE_USER


async def test_an_unknown_name_cannot_be_made_administrator(home):
    refusal = await refused(NotFound, home.stub().GrantAdmin(pb.GrantAdminRequest(login="nobody", secret="5ecret")))

    assert (refusal.reason, refusal.metadata["user_id"]) == ("USER_NOT_FOUND", "nobody")


async def test_services_read_role_and_status(home):
    ada = await home.registered("ada")

    account = await home.stub(caller="auth").GetAccount(pb.GetAccountRequest(user_id=ada.user_id))

    assert account == pb.Account(
        user_id=ada.user_id,
        role=pb.User.ROLE_USER,
        status=pb.User.STATUS_ACTIVE,
        generation=f"{ada.user_id}/1",
    )


async def test_forgetting_keeps_what_may_still_be_repeated(home):
    user = await home.stub().RegisterUser(registration(request_id="r1"))

    async with home.sql.transaction() as connection:
        fence = await lock.draw(connection, lock_table, FORGET)
    await home.accounts.forget(fence)

    assert (await home.stub().RegisterUser(registration(request_id="r1"))).user_id == user.user_id


@pytest.mark.parametrize("many", ["keys", "events"])
async def test_forgetting_drops_all_that_is_older_than_anybody_repeats(home, many):
    now, day, moment = datetime.now(UTC), timedelta(days=1), timedelta(minutes=1)
    key = {"caller": "ada", "method": "RegisterUser", "fingerprint": b"f", "resource_id": "usr_1"}
    keys = idempotency.FORGOTTEN_AT_ONCE + 1 if many == "keys" else 1
    events = inbox.FORGOTTEN_AT_ONCE + 1 if many == "events" else 1
    async with home.sql.transaction() as connection:
        times = [now - day + moment, *[now - day - moment] * keys]
        await connection.execute(
            insert(idempotency_table), [{**key, "key": str(n), "create_time": time} for n, time in enumerate(times)]
        )
        times = [now - 30 * day + moment, *[now - 30 * day - moment] * events]
        await connection.execute(
            insert(inbox_table),
            [{"consumer": "user.events", "event_id": str(n), "receive_time": time} for n, time in enumerate(times)],
        )
        fence = await lock.draw(connection, lock_table, FORGET)

    await home.accounts.forget(fence)

    async with home.sql.reading() as connection:
        assert (await connection.scalars(select(idempotency_table.c.key))).all() == ["0"]
        assert (await connection.scalars(select(inbox_table.c.event_id))).all() == ["0"]
