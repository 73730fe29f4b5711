import asyncio
import threading

import pytest
from argon2 import PasswordHasher

from services.user.domain import PasswordsBusy
from services.user.passwords import AT_ONCE, WAITING, Argon2Passwords


@pytest.fixture(scope="module")
def passwords():
    return Argon2Passwords()


async def test_a_password_matches_its_own_hash_only(passwords):
    password_hash = await passwords.hashed("correct horse")

    assert await passwords.matches(password_hash, "correct horse")
    assert not await passwords.matches(password_hash, "battery staple")


async def test_nobody_s_password_never_matches(passwords):
    assert not await passwords.matches(None, "correct horse")


async def test_hashes_are_argon2id_with_a_salt_of_their_own(passwords):
    first, second = await passwords.hashed("correct horse"), await passwords.hashed("correct horse")

    assert first.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert first != second


async def test_a_hash_with_other_parameters_is_outdated(passwords):
    old = PasswordHasher(time_cost=1, memory_cost=1024, parallelism=1).hash("correct horse")

    assert await passwords.matches(old, "correct horse")
    assert passwords.outdated(old)
    assert not passwords.outdated(await passwords.hashed("correct horse"))


async def test_r20_the_loop_that_answers_health_turns_while_a_password_is_hashed(passwords):
    hashing = asyncio.create_task(passwords.hashed("correct horse"))
    turns = 0

    while not hashing.done():
        await asyncio.sleep(0)
        turns += 1

    assert turns > 10  # hashed on the loop, it is done after the first


async def test_beyond_the_queue_people_are_told_to_come_back():
    passwords = Argon2Passwords()
    gate = threading.Event()
    asked = [asyncio.create_task(passwords._run(gate.wait)) for _ in range(AT_ONCE + WAITING)]
    await asyncio.sleep(0)  # each task gets as far as its place in the queue

    with pytest.raises(PasswordsBusy) as refusal:
        await passwords.hashed("correct horse")

    gate.set()
    await asyncio.gather(*asked)
    assert refusal.value.retry_after_seconds == 1
    assert await passwords.hashed("correct horse")
