"""Getting into the registry and staying there; following the instances of others."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh import VERSION, discovery
from mesh.discovery import Registration
from tests.eventually import eventually
from tests.service.mesh.registry import Registry, config, running

TASK = Registration("task", "task-1", "127.0.0.1", 5000, "127.0.0.1:5001", {"x": "y"})
HTTP = Registration("task-http", "task-1-http", "127.0.0.1", 5002, "127.0.0.1:5001")


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    async with running() as made:
        yield made


async def test_an_instance_is_registered_with_its_check_and_taken_out_at_the_end(registry, tmp_path) -> None:
    async with discovery.registered(config(tmp_path, registry.url), [TASK, HTTP]):
        await eventually(lambda: len(registry.services) == 2)
        found = registry.services["task-1"]

    assert (found["Name"], found["Address"], found["Port"]) == ("task", "127.0.0.1", 5000)
    assert found["Meta"] == {"version": VERSION, "process": str(os.getpid()), "x": "y"}
    assert found["Check"]["grpc"] == "127.0.0.1:5001"
    assert found["Check"]["interval"] == "1s"
    # Consul looks every 30 s, so that a dead one is out of the catalog within two minutes.
    assert found["Check"]["DeregisterCriticalServiceAfter"] == "1m"
    assert registry.services == {}


async def test_what_the_registry_forgot_is_registered_again_and_the_rest_left_alone(registry, tmp_path) -> None:
    async with discovery.registered(config(tmp_path, registry.url), [TASK, HTTP]):
        await eventually(lambda: len(registry.services) == 2)

        del registry.services["task-1"]

        await eventually(lambda: "task-1" in registry.services, within_seconds=15)
        assert registry.events == ["register task-1", "register task-1-http", "register task-1"]


async def test_an_instance_gets_in_as_soon_as_the_registry_is_there(registry, tmp_path, caplog) -> None:
    await registry.stop()
    async with discovery.registered(config(tmp_path, registry.url), [TASK]):
        await asyncio.sleep(0)
        await registry.start()

        await eventually(lambda: "task-1" in registry.services)


@pytest.mark.parametrize("port", [5000, 4999])
async def test_what_an_earlier_life_left_is_replaced(registry, tmp_path, port) -> None:
    left = {"ID": "task-1", "Address": "127.0.0.1", "Port": port, "Check": {"grpc": "127.0.0.1:4001"}}
    registry.services["task-1"] = left

    async with discovery.registered(config(tmp_path, registry.url), [TASK]):
        await eventually(lambda: registry.services["task-1"]["Port"] == 5000)
        await eventually(lambda: registry.services["task-1"]["Check"]["grpc"] == "127.0.0.1:5001")


@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "stopped"])
async def test_without_a_registry_an_instance_still_ends(registry, tmp_path, hangs, caplog) -> None:
    async with discovery.registered(config(tmp_path, registry.url), [TASK, HTTP]):
        await eventually(lambda: len(registry.services) == 2)
        registry.hangs = hangs
        if not hangs:
            await registry.stop()
        began = time.monotonic()

    assert time.monotonic() - began < 5
    assert "could not take task-1 out of the registry" in caplog.text
    if not hangs:
        await registry.start()


async def test_others_are_followed_as_they_come_and_go(registry, tmp_path: Path) -> None:
    await registry.serve("storage-http", ("127.0.0.1", 2), ("127.0.0.1", 1))
    async with discovery.followed("storage-http", config(tmp_path, registry.url)) as endpoints:
        await eventually(lambda: endpoints.addresses() == ["127.0.0.1:1", "127.0.0.1:2"])

        await registry.serve("storage-http", ("127.0.0.1", 3))
        await eventually(lambda: endpoints.addresses() == ["127.0.0.1:3"])

        await registry.serve("storage-http")
        await eventually(lambda: endpoints.addresses() == [])


async def test_the_last_known_instances_stay_while_the_registry_is_away(registry, tmp_path) -> None:
    await registry.serve("storage-http", ("127.0.0.1", 1))
    async with discovery.followed("storage-http", config(tmp_path, registry.url)) as endpoints:
        await eventually(endpoints.addresses)

        await registry.stop()
        await asyncio.sleep(0.2)  # there is nothing to wait for: nothing happens
        assert endpoints.addresses() == ["127.0.0.1:1"]

        registry.forget_index()
        registry.passing["storage-http"] = [("127.0.0.1", 2)]
        await registry.start()
        await eventually(lambda: endpoints.addresses() == ["127.0.0.1:2"])


async def test_what_an_instance_says_of_itself_is_cut_to_what_the_registry_takes(registry, tmp_path) -> None:
    refusal = "время_жизни: Extra inputs are not permitted; " * 20
    task = Registration("task", "task-1", "127.0.0.1", 5000, "127.0.0.1:5001", {"settings_refused": refusal})

    async with discovery.registered(config(tmp_path, registry.url), [task]):
        await eventually(lambda: "task-1" in registry.services)

        assert refusal.startswith(registry.services["task-1"]["Meta"]["settings_refused"])


async def test_what_an_instance_says_of_itself_is_carried_over_when_it_changes(registry, tmp_path) -> None:
    task = Registration("task", "task-1", "127.0.0.1", 5000, "127.0.0.1:5001", {"settings": "{}"})
    async with discovery.registered(config(tmp_path, registry.url), [task]):
        await eventually(lambda: len(registry.services) == 1)

        task.meta["settings"] = '{"attempts": 4}'

        await eventually(lambda: registry.services["task-1"]["Meta"]["settings"] == '{"attempts": 4}')
