"""Items that wait at the same time are done in one go, and each caller hears of its own."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Sequence

import pytest

from mesh.errors import Unavailable
from mesh.together import Together
from tests.eventually import eventually

request = contextvars.ContextVar("request", default="none")


class Work:
    """Doubles numbers; odd ones fail. Waits in each go until `go_on` is set."""

    def __init__(self) -> None:
        self.goes: list[list[int]] = []
        self.requests: list[str] = []
        self.go_on = asyncio.Event()
        self.failure: Exception | None = None

    async def __call__(self, items: Sequence[int]) -> list[int | Exception]:
        self.goes.append([*items])
        self.requests.append(request.get())
        await self.go_on.wait()
        if self.failure:
            raise self.failure
        return [ValueError(item) if item % 2 else 2 * item for item in items]


@pytest.fixture
async def work() -> Work:
    return Work()


async def test_those_that_wait_are_done_together_up_to_a_bound(work: Work) -> None:
    together = Together(work, at_most=4)
    first = asyncio.create_task(together(2))
    await eventually(lambda: work.goes)
    others = [asyncio.create_task(together(number)) for number in (4, 6, 8, 10, 12)]
    await asyncio.sleep(0)

    work.go_on.set()

    assert await asyncio.gather(first, *others) == [4, 8, 12, 16, 20, 24]
    assert work.goes == [[2], [4, 6, 8, 10], [12]]


async def test_each_hears_of_its_own_failure_only(work: Work) -> None:
    work.go_on.set()
    together = Together(work, at_most=4)

    answers = await asyncio.gather(*map(together, (1, 2, 3)), return_exceptions=True)

    assert [str(each) for each in answers] == ["1", "4", "3"]
    assert [type(each) for each in answers] == [ValueError, int, ValueError]


async def test_what_ends_all_is_told_to_all_and_the_next_go_on(work: Work) -> None:
    work.go_on.set()
    together, work.failure = Together(work, at_most=4), Unavailable("all")

    answers = await asyncio.gather(*map(together, (2, 4)), return_exceptions=True)
    work.failure = None

    assert [type(each) for each in answers] == [Unavailable, Unavailable]
    assert await together(6) == 12
    assert work.goes == [[2, 4], [6]]


async def test_one_that_breaks_the_whole_breaks_itself_alone() -> None:
    async def do(items: Sequence[int]) -> list[int | Exception]:
        if 0 in items:
            raise ZeroDivisionError
        return [12 // item for item in items]

    together = Together(do, at_most=4)

    answers = await asyncio.gather(*map(together, (1, 0, 2)), return_exceptions=True)

    assert [answers[0], type(answers[1]), answers[2]] == [12, ZeroDivisionError, 6]


async def test_who_leaves_before_his_turn_is_not_done_and_later_disturbs_nobody(work: Work) -> None:
    together = Together(work, at_most=4)
    begun = asyncio.create_task(together(2))
    await eventually(lambda: work.goes)
    waiting, staying = asyncio.create_task(together(4)), asyncio.create_task(together(6))
    await asyncio.sleep(0)

    begun.cancel()
    waiting.cancel()
    work.go_on.set()

    assert await staying == 12
    assert work.goes == [[2], [6]]
    assert (begun.cancelled(), waiting.cancelled()) == (True, True)


async def test_who_leaves_while_his_is_done_takes_nothing_from_those_who_stay(work: Work) -> None:
    together = Together(work, at_most=4)
    leaving, staying = asyncio.create_task(together(2)), asyncio.create_task(together(4))
    await eventually(lambda: work.goes == [[2, 4]])

    leaving.cancel()
    await asyncio.wait([leaving])
    work.go_on.set()

    assert await asyncio.wait_for(staying, 5) == 8


async def test_what_everybody_has_left_is_broken_off_and_what_somebody_waits_for_is_not(work: Work) -> None:
    ended = asyncio.Event()

    async def noted(items: Sequence[int]) -> list[int | Exception]:
        try:
            return await work(items)
        finally:
            ended.set()

    together = Together(noted, at_most=4)
    leaving, staying = asyncio.create_task(together(2)), asyncio.create_task(together(4))
    await eventually(lambda: work.goes == [[2, 4]])

    leaving.cancel()
    await asyncio.wait([leaving])
    await asyncio.sleep(0.05)
    kept = not ended.is_set()
    staying.cancel()

    await asyncio.wait_for(ended.wait(), 5)
    work.go_on.set()
    assert kept
    assert await together(6) == 12


async def test_what_is_done_together_is_of_no_request(work: Work) -> None:
    work.go_on.set()
    request.set("the first one's")

    await Together(work, at_most=4)(2)

    assert work.requests == ["none"]
