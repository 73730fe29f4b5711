"""What is believed of Consul, and what is kept."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path

import pytest
from consul import ConsulException

from mesh.control import known
from mesh.control.catalog import Follower, Instance, settled
from mesh.control.known import NOTHING, Known
from tests.eventually import eventually

ONE, TWO = Instance("127.0.0.1", 1, "task-1"), Instance("127.0.0.1", 2, "task-2")


class FakeConsul:
    """Blocking queries over a dictionary."""

    def __init__(self, **services: tuple[Instance, ...]) -> None:
        self.index = 10
        self.failing = False
        self.replaying = False
        self.read = services
        self.critical: dict[str, str] = {}
        self.changed = asyncio.Event()
        self.queries: dict[str, int] = defaultdict(int)
        self.health = self.catalog = self

    def set(self, *, index: int | None = None, **services: tuple[Instance, ...]) -> None:
        self.read = services
        self.index = self.index + 1 if index is None else index
        self.changed.set()
        self.changed = asyncio.Event()

    async def _answer(self, index: int | None) -> None:
        if index == self.index and not self.failing:
            await self.changed.wait()
        if self.failing:
            raise ConsulException("500")

    async def service(self, name: str, index: int | None = None, wait: str = ""):
        self.queries[name] += 1
        await self._answer(index)
        entries = [
            {
                "Node": {"Address": "127.0.0.9"},
                "Service": {"ID": found.instance_id, "Address": found.host, "Port": found.port, "Meta": None},
                "Checks": [
                    {"ServiceID": "", "Status": "passing", "Output": "of the agent"},
                    {
                        "ServiceID": found.instance_id,
                        "Status": "critical" if found.instance_id in self.critical else "passing",
                        "Output": self.critical.get(found.instance_id, "fine"),
                    },
                ],
            }
            for found in self.read.get(name, ())
        ]
        return str(self.index), entries

    async def services(self, index: int | None = None, wait: str = "", consistency: str = "default"):
        if self.replaying and consistency == "consistent":
            raise ConsulException("500 Not ready to serve consistent reads")
        await self._answer(index)
        return str(self.index), {name: [] for name in self.read}


class Followed:
    """A follower at work, with short times."""

    def __init__(self, consul: FakeConsul, last: dict | None = None) -> None:
        self.changes = 0
        self.follower = Follower(consul, ["task", "user"], last or {}, self._count, settle_seconds=0.5)

    def _count(self) -> None:
        self.changes += 1

    async def __aenter__(self) -> Follower:
        self._task = asyncio.create_task(self.follower.run())
        return self.follower

    async def __aexit__(self, *exception: object) -> None:
        self._task.cancel()


async def test_instances_come_and_go() -> None:
    consul = FakeConsul(task=(ONE,))
    async with Followed(consul) as follower:
        await follower.complete.wait()
        first = follower.catalog

        consul.set(task=(TWO,))

        assert first == {"task": (ONE,), "user": ()}
        await eventually(lambda: follower.catalog["task"] == (TWO,))


async def test_it_is_complete_only_when_every_service_was_read() -> None:
    consul = FakeConsul(task=(ONE,))
    async with Followed(consul) as follower:
        await follower.complete.wait()

        assert set(follower.catalog) >= {"task", "user"}


async def test_a_service_that_no_contract_names_is_followed_when_it_registers() -> None:
    consul = FakeConsul()
    async with Followed(consul) as follower:
        await follower.complete.wait()

        consul.set(notification=(ONE,))

        await eventually(lambda: follower.catalog.get("notification") == (ONE,))


async def test_an_error_leaves_the_last_catalog() -> None:
    consul = FakeConsul(task=(ONE,))
    async with Followed(consul) as follower:
        await follower.complete.wait()

        consul.failing = True
        consul.set()
        await asyncio.sleep(0.7)

        assert follower.catalog["task"] == (ONE,)


async def test_a_consul_that_wakes_up_empty_is_believed_only_after_a_while() -> None:
    consul = FakeConsul(task=(ONE,))
    async with Followed(consul) as follower:
        await follower.complete.wait()

        consul.set(index=3)
        await asyncio.sleep(0.2)
        at_first = follower.catalog["task"]

        assert at_first == (ONE,)
        await eventually(lambda: follower.catalog["task"] == ())


async def test_what_comes_back_to_a_wiped_consul_is_taken_at_once() -> None:
    consul = FakeConsul(task=(ONE,))
    async with Followed(consul) as follower:
        await follower.complete.wait()

        consul.set(index=3, task=(TWO,))

        await eventually(lambda: follower.catalog["task"] == (ONE, TWO), within_seconds=0.4)
        await eventually(lambda: follower.catalog["task"] == (TWO,))


async def test_the_past_that_a_consul_replays_at_its_start_is_not_believed() -> None:
    consul = FakeConsul(task=(TWO,))
    async with Followed(consul) as follower:
        await follower.complete.wait()
        consul.failing = True
        consul.set(task=(ONE,), index=3)  # where task-1 was, long ago
        await asyncio.sleep(0.2)
        consul.failing, consul.replaying = False, True
        await asyncio.sleep(0.3)
        assert follower.catalog["task"] == (TWO,)

        consul.set(task=(TWO,), index=11)
        consul.replaying = False

        await asyncio.sleep(0.3)
        assert follower.catalog["task"] == (TWO,)


async def test_born_while_consul_is_down_it_has_what_was_known() -> None:
    consul = FakeConsul()
    consul.failing = True
    async with Followed(consul, {"task": (ONE,)}) as follower:
        await asyncio.wait_for(follower.complete.wait(), 2)

        assert follower.catalog == {"task": (ONE,)}


async def test_born_while_consul_is_up_it_does_not_show_what_was_known() -> None:
    followed = Followed(FakeConsul(task=(TWO,)), {"task": (ONE,)})
    async with followed as follower:
        await asyncio.wait_for(follower.complete.wait(), 2)

        assert follower.catalog["task"] == (TWO,)
        assert followed.changes == 1


async def test_born_while_consul_is_down_and_knowing_nothing_it_waits() -> None:
    consul = FakeConsul()
    consul.failing = True
    async with Followed(consul) as follower:
        await asyncio.sleep(0.3)

        assert not follower.complete.is_set()


async def test_an_instance_that_fails_its_check_gets_no_calls_and_is_seen_with_the_reason() -> None:
    consul = FakeConsul(task=(ONE, TWO))
    async with Followed(consul) as follower:
        await follower.complete.wait()
        before = follower.seen["task"]

        consul.critical = {"task-2": "connection refused"}
        consul.set(task=(ONE, TWO))
        await eventually(lambda: follower.catalog["task"] == (ONE,))

        well, ill = follower.seen["task"]["task-1"], follower.seen["task"]["task-2"]
        assert (ill.status, ill.output) == ("critical", "connection refused")
        assert ill.since > before["task-2"].since
        assert well.since == before["task-1"].since


async def test_answers_without_news_are_no_change() -> None:
    consul = FakeConsul(task=(ONE,))
    followed = Followed(consul)
    async with followed as follower:
        await follower.complete.wait()
        queries = consul.queries["task"]

        consul.set(task=(ONE,))

        await eventually(lambda: consul.queries["task"] > queries)
        assert followed.changes == 1


def test_what_is_missing_is_kept_and_what_is_new_is_taken_while_consul_wakes() -> None:
    assert settled({"task": (ONE,), "user": (ONE,)}, {"task": (TWO,)}) == {"task": (ONE, TWO), "user": (ONE,)}


def test_what_is_known_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "data" / "control-1.json"
    present = Known({"task": (ONE, TWO), "user": ()}, '{"keys": []}')

    known.save(path, present)

    assert known.load(path) == present
    assert [entry.name for entry in path.parent.iterdir()] == ["control-1.json"]


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"catalog": {"task": [{"hose": 1}]}, "jwks": null}'])
def test_a_file_that_cannot_be_read_is_as_good_as_none(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "control-1.json"
    if content is not None:
        path.write_text(content)

    assert known.load(path) == NOTHING
