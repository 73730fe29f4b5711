"""atelier.user.v1.UserService: read the request, call the domain, write the answer."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from atelier.auth.v1 import auth_pb2, auth_pb2_grpc
from atelier.task.v1 import task_pb2_grpc
from atelier.user.v1 import user_pb2 as pb
from atelier.user.v1 import user_pb2_grpc

from mesh import context, ids
from mesh.clock import Clock
from mesh.errors import NotFound
from services.user import convert
from services.user.domain import (
    HOLD_BEFORE_ASKING,
    Account,
    Accounts,
    CredentialsInvalid,
    IdempotencyKeyReused,
    Passwords,
    Quotas,
    Reservation,
    Role,
    SecretInvalid,
    State,
    allowed,
    disputed,
    not_found,
    require_active,
    require_charged,
    require_strong,
)

AUDITED_AT_ONCE = 50  # reservations, each a question to the task service
LOOK_AGAIN_SECONDS = 2.0  # after which the event of what had just ended has come, if the broker is well


class UserService(user_pb2_grpc.UserServiceServicer):
    """Raises MeshError only; the mesh turns it into a status.

    Args:
        accounts: where accounts are kept.
        quotas: where usage is counted.
        passwords: hashes and checks them.
        auth: opens sessions.
        tasks: knows what became of what was reserved for.
        admin_secret: what proves the right to make an administrator.
        clock: the time of day.
    """

    def __init__(
        self,
        accounts: Accounts,
        quotas: Quotas,
        passwords: Passwords,
        auth: auth_pb2_grpc.AuthServiceAsyncStub,
        tasks: task_pb2_grpc.TaskServiceAsyncStub,
        *,
        admin_secret: str,
        clock: Clock,
    ) -> None:
        self._accounts = accounts
        self._quotas = quotas
        self._passwords = passwords
        self._auth = auth
        self._tasks = tasks
        self._admin_secret = admin_secret
        self._clock = clock

    async def RegisterUser(self, request: pb.RegisterUserRequest, _: object) -> pb.User:
        email = convert.email_from(request.email)
        require_strong(request.password, username=request.username, email=email)
        new = Account(
            user_id=ids.new("usr"),
            username=request.username,
            email=email,
            password_hash=await self._passwords.hashed(request.password),
            create_time=self._clock.now(),
        )
        account = await self._accounts.register(new, request_id=request.request_id)
        repeated = account.user_id != new.user_id
        # The request's fingerprint leaves the password out, so a repetition must prove that it is one.
        if repeated and not await self._passwords.matches(account.password_hash, request.password):
            raise IdempotencyKeyReused(
                f"The request id {request.request_id} was used for another request. Use a new one for a new request.",
                metadata={"request_id": request.request_id},
            )
        return await self._user(account)

    async def Login(self, request: pb.LoginRequest, _: object) -> pb.LoginResponse:
        account = await self._accounts.find(convert.login_from(request.login))
        right = await self._passwords.matches(account.password_hash if account else None, request.password)
        if account is None or not right:
            raise CredentialsInvalid("Name or password is wrong.")
        require_active(account)
        if self._passwords.outdated(account.password_hash):
            await self._accounts.rehash(
                account.user_id, old=account.password_hash, new=await self._passwords.hashed(request.password)
            )
        tokens = await self._auth.IssueTokens(
            auth_pb2.IssueTokensRequest(
                user_id=account.user_id, role=convert.role_name(account.role), generation=account.generation_id
            )
        )
        return pb.LoginResponse(
            access_token=tokens.access_token,
            refresh_token=tokens.refresh_token,
            expire_time=tokens.expire_time,
            user=await self._user(account),
        )

    async def GetUser(self, request: pb.GetUserRequest, _: object) -> pb.User:
        return await self._user(await self._accounts.get(_subject(request.user_id)))

    async def UpdateUser(self, request: pb.UpdateUserRequest, _: object) -> pb.User:
        user_id = _subject(request.user.user_id)
        return await self._user(await self._accounts.change(user_id, lambda account: convert.updated(account, request)))

    async def GetQuota(self, request: pb.GetQuotaRequest, _: object) -> pb.Quota:
        return await self._quota(await self._accounts.get(_subject(request.user_id)))

    async def CheckPermission(self, request: pb.CheckPermissionRequest, _: object) -> pb.CheckPermissionResponse:
        account = await self._accounts.get(_subject(request.user_id))
        return pb.CheckPermissionResponse(allowed=allowed(account, request.permission))

    async def SetLimits(self, request: pb.SetLimitsRequest, _: object) -> pb.Quota:
        user_id = _subject(request.user_id)
        return await self._quota(
            await self._accounts.change(user_id, lambda account: convert.limited(account, request))
        )

    async def AuditQuotas(self, request: pb.AuditQuotasRequest, _: object) -> pb.AuditQuotasResponse:
        drifts = [] if request.page_token else await self._quotas.audit()
        after = convert.audit_place_from(request.page_token)
        held_before = self._clock.now() - HOLD_BEFORE_ASKING
        reservations = await self._quotas.of_tasks(after, held_before, AUDITED_AT_ONCE)
        disputes = await self._disputes(reservations)
        if disputes:
            # A task is asked about later than its reservation was read, and its events come later still.
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
            reservations = await self._quotas.of_tasks(after, held_before, AUDITED_AT_ONCE)
            disputes = [each for each in await self._disputes(reservations) if each in disputes]
        return pb.AuditQuotasResponse(
            drifts=map(convert.drift_to_proto, drifts),
            disputes=disputes,
            reservation_count=len(reservations),
            next_page_token=convert.audit_page_token(reservations, AUDITED_AT_ONCE),
        )

    async def SetRole(self, request: pb.SetRoleRequest, _: object) -> pb.User:
        user_id = _subject(request.user_id)
        return await self._user(
            await self._accounts.change(user_id, lambda account: convert.promoted(account, request))
        )

    async def GrantAdmin(self, request: pb.GrantAdminRequest, _: object) -> pb.User:
        if not hmac.compare_digest(request.secret.encode(), self._admin_secret.encode()):
            raise SecretInvalid("This is not the installation's admin secret.")
        account = await self._accounts.find(convert.login_from(request.login))
        if account is None:
            raise not_found(request.login)
        return await self._user(
            await self._accounts.change(account.user_id, lambda present: replace(present, role=Role.ADMIN))
        )

    async def GetAccount(self, request: pb.GetAccountRequest, _: object) -> pb.Account:
        return convert.account_to_proto(await self._accounts.get(request.user_id))

    async def ReserveQuota(self, request: pb.ReserveQuotaRequest, _: object) -> pb.Reservation:
        [reservation] = await self._reserved([request.reservation_id], request, charge=request.charge)
        return reservation

    async def ReserveQuotas(self, request: pb.ReserveQuotasRequest, _: object) -> pb.ReserveQuotasResponse:
        return pb.ReserveQuotasResponse(reservations=await self._reserved(request.reservation_ids, request))

    async def SettleQuota(self, request: pb.SettleQuotaRequest, _: object) -> pb.Reservation:
        moved = await self._quotas.move(request.reservation_id, State.SETTLED, self._clock.now())
        return convert.reservation_to_proto(require_charged(request.reservation_id, moved))

    async def ReleaseQuota(self, request: pb.ReleaseQuotaRequest, _: object) -> pb.ReleaseQuotaResponse:
        await self._quotas.release(request.reservation_id, request.user_id, self._clock.now())
        return pb.ReleaseQuotaResponse()

    async def _disputes(self, reservations: Sequence[Reservation]) -> list[pb.AuditQuotasResponse.Dispute]:
        return [each for each in await asyncio.gather(*map(self._dispute, reservations)) if each is not None]

    async def _dispute(self, reservation: Reservation) -> pb.AuditQuotasResponse.Dispute | None:
        """Return what is wrong with a task's reservation, if anything is."""
        wanted, known = State.RELEASED, False
        with suppress(NotFound):
            task = await self._tasks.LookupTask(convert.lookup_of(reservation.reservation_id))
            wanted, known = convert.fate_from(reservation.reservation_id, task), True
        if not disputed(reservation.state, wanted, task_is_known=known):
            return None
        return convert.dispute_to_proto(reservation, wanted)

    async def _reserved(
        self,
        reservation_ids: Sequence[str],
        request: pb.ReserveQuotaRequest | pb.ReserveQuotasRequest,
        *,
        charge: bool = False,
    ) -> list[pb.Reservation]:
        kind, now = convert.kind_from(request.kind), self._clock.now()
        reservations = await self._quotas.reserve(
            reservation_ids, request.user_id, kind, request.amount, now, charge=charge
        )
        return [convert.reservation_to_proto(each) for each in reservations]

    async def _user(self, account: Account) -> pb.User:
        now = self._clock.now()
        return convert.user_to_proto(account, await self._quotas.usage(account.user_id, now), now)

    async def _quota(self, account: Account) -> pb.Quota:
        now = self._clock.now()
        return convert.quota_to_proto(account, await self._quotas.usage(account.user_id, now), now)


def _subject(user_id: str) -> str:
    """Return whose account is meant; to others than its owner and administrators there is none."""
    asking = context.user()
    if user_id in {"me", asking.user_id}:
        return asking.user_id
    if asking.role != convert.role_name(Role.ADMIN):
        raise not_found(user_id)
    return user_id
