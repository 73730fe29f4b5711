"""Between atelier.auth.v1, atelier.mesh.v1, what it asks of atelier.user.v1, and the domain."""

from __future__ import annotations

from datetime import datetime

from atelier.auth.v1 import auth_pb2 as pb
from atelier.mesh.v1 import identity_pb2
from atelier.user.v1 import user_pb2

from mesh.wire import timestamp
from services.auth.domain import Revocation, SigningKey


def tokens_to_proto(access_token: str, refresh_token: str, expire_time: datetime) -> pb.Tokens:
    return pb.Tokens(access_token=access_token, refresh_token=refresh_token, expire_time=timestamp(expire_time))


def key_to_proto(key: SigningKey) -> pb.RotateKeysResponse:
    return pb.RotateKeysResponse(key_id=key.key_id, sign_time=timestamp(key.sign_time))


def revocation_to_proto(revocation: Revocation) -> identity_pb2.Revocation:
    return identity_pb2.Revocation(
        claim=revocation.claim, value=revocation.value, expire_time=timestamp(revocation.expire_time)
    )


def is_active(account: user_pb2.Account) -> bool:
    return account.status == user_pb2.User.STATUS_ACTIVE


def role_from(account: user_pb2.Account) -> str:
    """Return the role as the access token's claim says it."""
    return user_pb2.User.Role.Name(account.role)
