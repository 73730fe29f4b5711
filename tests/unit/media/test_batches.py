from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest

from mesh.errors import Internal
from services.media.domain import OutOfMemory
from services.media.worker.batches import Batches
from tests.eventually import eventually

LONG = 60.0


class Machine:
    """Computes squares, a batch when it is let, and remembers the batches."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.batches: list[list[int]] = []
        self.begun: list[list[int]] = []
        self.let = threading.Event()
        self.let.set()

    def compute(self, items: Sequence[int]) -> Sequence[int]:
        self.begun.append(list(items))
        self.let.wait(10)
        if len(items) > self.room:
            raise OutOfMemory("Too many.")
        if any(item < 0 for item in items):
            raise Internal("No square of it.")
        self.batches.append(list(items))
        return [item * item for item in items]


@asynccontextmanager
async def running(
    compute: Callable[[Sequence[int]], Sequence[int]], *, at_most: int = 4, wait_seconds: float = LONG, at_once: int = 1
) -> AsyncIterator[Batches[int, int]]:
    with ThreadPoolExecutor(at_once) as threads:
        batches = Batches(compute, threads, at_most=at_most, wait_seconds=wait_seconds, at_once=at_once)
        task = asyncio.create_task(batches.run())
        yield batches
        task.cancel()
        await asyncio.wait([task])


async def test_a_batch_goes_when_it_is_full_however_long_others_might_be_waited_for():
    machine = Machine()
    async with running(machine.compute, at_most=3) as batches:
        assert await asyncio.gather(*map(batches.result, range(6))) == [0, 1, 4, 9, 16, 25]

    assert machine.batches == [[0, 1, 2], [3, 4, 5]]


async def test_a_batch_that_is_not_full_goes_when_its_first_item_has_waited():
    machine = Machine()
    async with running(machine.compute, at_most=100, wait_seconds=0.05) as batches:
        async with asyncio.timeout(5):
            assert await asyncio.gather(batches.result(2), batches.result(3)) == [4, 9]

    assert machine.batches == [[2, 3]]


async def test_the_next_batch_is_collected_while_one_is_computed():
    machine = Machine()
    machine.let.clear()
    async with running(machine.compute, at_most=2, wait_seconds=0.01) as batches:
        first = asyncio.create_task(batches.result(1))
        await eventually(lambda: machine.begun == [[1]])
        others = [asyncio.create_task(batches.result(item)) for item in (2, 3)]
        await asyncio.sleep(0)
        machine.let.set()
        await asyncio.gather(first, *others)

    assert machine.batches == [[1], [2, 3]]


async def test_two_batches_are_computed_at_once_where_that_pays():
    machine = Machine()
    machine.let.clear()
    async with running(machine.compute, at_most=1, at_once=2) as batches:
        results = [asyncio.create_task(batches.result(item)) for item in (1, 2, 3)]
        await eventually(lambda: len(machine.begun) == 2)
        machine.let.set()
        await asyncio.gather(*results)


async def test_out_of_memory_halves_the_batch_and_those_after_it():
    machine = Machine(room=2)
    async with running(machine.compute, at_most=8) as batches:
        assert await asyncio.gather(*map(batches.result, range(8))) == [item * item for item in range(8)]
        assert batches.at_most == 2
        assert await asyncio.gather(*map(batches.result, (8, 9))) == [64, 81]

    assert machine.begun[:3] == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3], [0, 1]]


async def test_an_item_that_fits_nowhere_fails_typed_and_alone():
    machine = Machine(room=0)
    async with running(machine.compute, at_most=1) as batches:
        with pytest.raises(OutOfMemory):
            await batches.result(1)
        machine.room = 1
        assert await batches.result(2) == 4


async def test_one_bad_item_fails_and_the_others_of_its_batch_do_not():
    machine = Machine()
    async with running(machine.compute, at_most=5) as batches:
        found = await asyncio.gather(*map(batches.result, (1, 2, -3, 4, 5)), return_exceptions=True)

    assert [each for each in found if not isinstance(each, Internal)] == [1, 4, 16, 25]
    assert isinstance(found[2], Internal)
    assert batches.at_most == 5


async def test_an_item_whose_caller_went_takes_no_others_with_it():
    machine = Machine()
    machine.let.clear()
    async with running(machine.compute, at_most=2, wait_seconds=0.01) as batches:
        computed = [asyncio.create_task(batches.result(item)) for item in (1, 2)]
        await eventually(lambda: machine.begun == [[1, 2]])
        waiting = [asyncio.create_task(batches.result(item)) for item in (3, 4)]
        await asyncio.sleep(0)
        computed[0].cancel()  # of a batch that is computed
        waiting[0].cancel()  # of one that waits
        machine.let.set()

        assert (await computed[1], await waiting[1]) == (4, 16)

    assert machine.batches == [[1, 2], [4]]


async def test_results_that_are_not_one_for_each_item_leave_nobody_waiting():
    def wrong(items: Sequence[int]) -> Sequence[int]:
        return [0] if len(items) > 1 or items == [3] else []

    async with running(wrong, at_most=3) as batches, asyncio.timeout(5):
        found = await asyncio.gather(*map(batches.result, (1, 2, 3)), return_exceptions=True)

    assert [type(each) for each in found] == [ValueError, ValueError, int]


async def test_when_it_stops_nothing_more_is_computed():
    machine = Machine(room=1)
    machine.let.clear()
    with ThreadPoolExecutor(1) as threads:
        batches = Batches(machine.compute, threads, at_most=4, wait_seconds=LONG, at_once=1)
        task = asyncio.create_task(batches.run())
        waiting = [asyncio.create_task(batches.result(item)) for item in range(4)]
        await eventually(lambda: machine.begun == [[0, 1, 2, 3]])

        task.cancel()
        await asyncio.wait([task])
        machine.let.set()
        await asyncio.sleep(0.2)  # there is nothing to wait for: nothing happens

        assert machine.begun == [[0, 1, 2, 3]]
        for each in waiting:
            each.cancel()
