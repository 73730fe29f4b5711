"""Ids, page tokens, workers' capabilities and background work."""

from __future__ import annotations

import asyncio
import json
import re
from base64 import urlsafe_b64encode
from datetime import UTC, datetime, timedelta

import jwt
import pytest

from mesh import capability, ids, paging
from mesh.capability import Capability, CapabilityInvalid
from mesh.errors import Unavailable
from mesh.paging import PageTokenMalformed
from mesh.service import every, working
from tests.eventually import eventually

KEY = "0123456789abcdef" * 4


def token_of(text: str) -> str:
    return urlsafe_b64encode(text.encode()).decode().rstrip("=")


def grant(lives_seconds: float = 60) -> Capability:
    expire_time = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=lives_seconds)
    return Capability("tsk_1", 2, "usr_1", ("fil_1", "fil_2"), 1000, expire_time)


def claims(**changed: object) -> dict[str, object]:
    right = {
        "aud": "storage", "exp": 4_000_000_000, "task": "tsk_1", "attempt": 1, "user": "usr_1", "inputs": [],
        "max_bytes": 1,
    }  # fmt: skip
    return {name: value for name, value in {**right, **changed}.items() if value is not None}


def test_an_id_is_its_prefix_and_26_characters_safe_in_any_path() -> None:
    assert re.fullmatch(r"tsk_[0-9a-v]{26}", ids.new("tsk"))


def test_ids_sort_by_the_time_they_were_made() -> None:
    made = [ids.new("tsk") for _ in range(5000)]

    assert made == sorted(made)


def test_a_parents_numbered_ids_are_ids_that_sort_by_their_numbers_and_are_nobody_elses() -> None:
    parents = [ids.new("bat") for _ in range(100)]

    made = [ids.numbered("tsk", parent, number) for parent in parents for number in (0, 1, 999, 4095)]

    assert made[:4] == sorted(made[:4]) == [ids.numbered("tsk", parents[0], number) for number in (0, 1, 999, 4095)]
    assert len({*made}) == 400
    assert all(re.fullmatch(r"tsk_[0-9a-v]{26}", each) for each in made)


def test_no_two_ids_are_the_same() -> None:
    assert len({ids.new("tsk") for _ in range(5000)}) == 5000


@pytest.mark.parametrize("key", [(1_700_000_000_000_000, "tsk_1"), ("", -1), ("größe 🙂", 2**63 - 1), (0, "a/b+c=")])
def test_a_page_token_gives_back_its_key(key) -> None:
    token = paging.encode(key)

    assert re.fullmatch(r"[A-Za-z0-9_-]+", token)
    assert paging.decode(token, [type(part) for part in key]) == key


@pytest.mark.parametrize(
    "token",
    [
        "", "x", "AAAA", "%%%", "größe", "\x00", "e30",
        token_of("null"), token_of("[]"), token_of('[1,"a",2]'), token_of('["a",1]'), token_of("[1,2]"),
        token_of('[true,"a"]'), token_of('[1.0,"a"]'), token_of('[NaN,"a"]'), token_of('[1,["a"]]'),
        token_of('{"0":1}'), token_of('[1,"a"'), token_of("[" * 100_000), token_of(f'[{"9" * 5000},"a"]'),
    ],
)  # fmt: skip
def test_a_token_that_no_list_gave_is_refused(token) -> None:
    with pytest.raises(PageTokenMalformed) as refused:
        paging.decode(token, (int, str))

    assert refused.value.reason == "PAGE_TOKEN_MALFORMED"
    assert "pageToken" in refused.value.violations


@pytest.mark.parametrize("text", [f'[{2**63},"a"]', f'[{-(2**63) - 1},"a"]', '[1,"\\ud800"]', '[1,"\\u0000"]'])
def test_a_token_whose_key_no_database_can_hold_is_refused(text) -> None:
    with pytest.raises(PageTokenMalformed):
        paging.decode(token_of(text), (int, str))


def test_a_capability_gives_back_what_was_granted() -> None:
    granted = grant()

    assert capability.verify(KEY, capability.sign(KEY, granted)) == granted


def test_a_capability_of_another_key_is_refused() -> None:
    with pytest.raises(CapabilityInvalid) as refused:
        capability.verify(KEY, capability.sign(KEY[::-1], grant()))

    assert (refused.value.code, refused.value.reason) == ("PERMISSION_DENIED", "CAPABILITY_INVALID")


def test_an_expired_capability_is_refused() -> None:
    with pytest.raises(CapabilityInvalid):
        capability.verify(KEY, capability.sign(KEY, grant(lives_seconds=-1)))


async def test_a_capability_that_was_shown_before_it_expired_is_refused_afterwards() -> None:
    token = capability.sign(KEY, grant(lives_seconds=3))
    capability.verify(KEY, token)

    def refused() -> bool:
        try:
            capability.verify(KEY, token)
        except CapabilityInvalid:
            return True
        return False

    await eventually(refused, within_seconds=10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"aud": "task"}, {"aud": None}, {"exp": None}, {"task": None}, {"attempt": None}, {"user": None},
        {"inputs": None}, {"max_bytes": None},
    ],
)  # fmt: skip
def test_a_capability_that_says_less_or_is_for_another_is_refused(wrong) -> None:
    with pytest.raises(CapabilityInvalid):
        capability.verify(KEY, jwt.encode(claims(**wrong), KEY, algorithm="HS256"))


@pytest.mark.parametrize(
    "token", ["", "x", "a.b.c", jwt.encode(claims(), None, algorithm="none"), json.dumps(claims())]
)
def test_what_is_not_a_signed_capability_is_refused(token) -> None:
    with pytest.raises(CapabilityInvalid):
        capability.verify(KEY, token)


def test_a_capability_signed_by_another_algorithm_is_refused() -> None:
    with pytest.raises(CapabilityInvalid):
        capability.verify(KEY, jwt.encode(claims(), KEY, algorithm="HS512"))


def test_a_capability_whose_claims_were_changed_is_refused() -> None:
    head, _, signature = capability.sign(KEY, grant()).split(".")

    with pytest.raises(CapabilityInvalid):
        capability.verify(KEY, f"{head}.{token_of(json.dumps(claims(user='usr_2')))}.{signature}")


async def test_work_that_found_something_away_is_taken_up_again_at_its_own_pace():
    calls = []

    async def step() -> None:
        calls.append("call")
        if len(calls) < 3:
            raise Unavailable("away")

    work = asyncio.create_task(every(0.01, step)())
    await eventually(lambda: len(calls) >= 4)
    work.cancel()


@pytest.mark.timeout(20)
async def test_background_work_that_fails_while_it_ends_ends() -> None:
    began = 0

    async def work() -> None:
        nonlocal began
        began += 1
        try:
            await asyncio.Event().wait()
        finally:
            raise Unavailable("away")

    async with working([work], NotImplemented):
        await asyncio.sleep(0.01)

    assert began == 1
