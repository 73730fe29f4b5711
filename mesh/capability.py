"""A worker's right to the files of one attempt at one task, signed by whoever gave it the task.

A JWT under HMAC-SHA256 (RFC 7515) with the installation's `capability.key`, which only its signer and
its verifier hold. It grants nothing beyond the files it names, and ends by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

import jwt

from mesh.errors import PermissionDenied

AUDIENCE = "storage"
CAPABILITY_KEY = "x-atelier-capability"  # of the metadata or header that carries it


class CapabilityInvalid(PermissionDenied):
    reason = "CAPABILITY_INVALID"


@dataclass(frozen=True, slots=True)
class Capability:
    """Read `input_file_ids`; write results of at most `max_bytes` each for `user_id`, until `expire_time`."""

    task_id: str
    attempt: int
    user_id: str
    input_file_ids: tuple[str, ...]
    max_bytes: int
    expire_time: datetime

    def require_input(self, file_id: str) -> None:
        """Refuse a file that it does not name. Raises CapabilityInvalid."""
        if file_id not in self.input_file_ids:
            raise CapabilityInvalid(f"The capability does not name the file {file_id}.", metadata={"file_id": file_id})


def sign(key: str, capability: Capability) -> str:
    """Return `capability` as a token."""
    return jwt.encode(
        {
            "aud": AUDIENCE,
            "exp": int(capability.expire_time.timestamp()),
            "task": capability.task_id,
            "attempt": capability.attempt,
            "user": capability.user_id,
            "inputs": list(capability.input_file_ids),
            "max_bytes": capability.max_bytes,
        },
        key,
        algorithm="HS256",
    )


def verify(key: str, token: str) -> Capability:
    """Return what `token` grants.

    Raises:
        CapabilityInvalid: not signed by `key`, not meant for storage, not whole, or expired.
    """
    try:
        granted = _granted(key, token)
    except jwt.InvalidTokenError:
        granted = None
    if granted is None or granted.expire_time <= datetime.now(UTC):
        raise CapabilityInvalid("The capability is not valid, or no longer; claim the task again.")
    return granted


@lru_cache(maxsize=1000)  # each is shown about three times within a second
def _granted(key: str, token: str) -> Capability:
    claims = jwt.decode(
        token,
        key,
        algorithms=["HS256"],
        audience=AUDIENCE,
        options={"require": ["exp", "aud", "task", "attempt", "user", "inputs", "max_bytes"]},
    )
    return Capability(
        task_id=claims["task"],
        attempt=claims["attempt"],
        user_id=claims["user"],
        input_file_ids=tuple(claims["inputs"]),
        max_bytes=claims["max_bytes"],
        expire_time=datetime.fromtimestamp(claims["exp"], UTC),
    )
