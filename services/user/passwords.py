"""Passwords as argon2id hashes (RFC 9106), two at a time."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from argon2 import PasswordHasher, Type
from argon2.exceptions import InvalidHashError, VerifyMismatchError

from services.user.domain import PasswordsBusy

MEMORY_KIB, PASSES, LANES = 19_456, 2, 1  # OWASP's password storage cheat sheet; 35 ms on the two-core machine
AT_ONCE = 2  # 38 MiB, and what two cores can do
WAITING = 64  # 1.2 s of work; later ones are better told to come back than kept until their deadline

T = TypeVar("T")


class Argon2Passwords:
    """Satisfies `domain.Passwords`. Threads do the work: argon2 lets go of the interpreter while it hashes."""

    def __init__(self) -> None:
        self._hasher = PasswordHasher(time_cost=PASSES, memory_cost=MEMORY_KIB, parallelism=LANES, type=Type.ID)
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="argon2")
        self._waiting = 0
        # Nobody's password: checked against when there is no account, so that the answer takes as long.
        self._dummy_hash = self._hasher.hash(secrets.token_hex())

    async def hashed(self, password: str) -> str:
        return await self._run(lambda: self._hasher.hash(password))

    async def matches(self, password_hash: str | None, password: str) -> bool:
        right = await self._run(lambda: self._verified(password_hash or self._dummy_hash, password))
        return right and password_hash is not None

    def outdated(self, password_hash: str) -> bool:
        return self._hasher.check_needs_rehash(password_hash)

    def _verified(self, password_hash: str, password: str) -> bool:
        try:
            return self._hasher.verify(password_hash, password)
        except (VerifyMismatchError, InvalidHashError):
            return False

    async def _run(self, work: Callable[[], T]) -> T:
        if self._waiting >= AT_ONCE + WAITING:
            raise PasswordsBusy("Too many people are signing in. Try again.", retry_after_seconds=1)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting -= 1
