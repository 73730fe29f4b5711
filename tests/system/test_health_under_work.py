"""R-20: work never blocks the loop that answers health."""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Awaitable, Callable

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.installation import Mesh
from tests.people import Person
from tests.photographs import photograph
from tests.system.test_main_job import upload, watched

ANSWER_SECONDS = 0.15  # three times the bound, since machines are shared
MUCH = {"fit": "FIT_FIT", "format": "FORMAT_AVIF"}  # of 4,000 pixels: some four seconds of pure CPU
SIZES = max(1, round(float(os.environ.get("ATELIER_TEST_CPU_SECONDS", "4")) / 4))  # of one task
IDLE = "media"  # has nothing to do here: what its health takes is the machine's own doing


async def health_of(mesh: Mesh, service: str) -> list[grpc.aio.Channel]:
    """Return a channel to what answers probes of each instance of a service: of its ports, the one in clear."""
    found = []
    for pid in mesh.pids(service).values():
        listening = [each for each in psutil.Process(pid).net_connections("inet") if each.status == psutil.CONN_LISTEN]
        for each in listening:
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{each.laddr.port}")
            try:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.aio.AioRpcError:
                await channel.close()
            else:
                found.append(channel)
    assert len(found) == len(mesh.pids(service))
    return found


async def answer_seconds(channel: grpc.aio.Channel, work: asyncio.Future[object]) -> list[float]:
    """Return how long probes took, sent at equal pace while `work` went on: the percentiles from p1 to p99, seconds."""

    async def probe() -> float:
        began = time.monotonic()
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
        return time.monotonic() - began

    probes = []
    while not work.done():
        probes.append(asyncio.create_task(probe()))  # not after the last one's answer: a pause would count once
        await asyncio.sleep(0.05)
    assert len(probes) > 10
    took = await asyncio.gather(*probes)
    of_a_hundred = statistics.quantiles(took, n=100, method="inclusive")
    shown = ", ".join(f"p{n} {of_a_hundred[n - 1] * 1000:.1f} ms" for n in (50, 90, 99))
    print(f"{len(took)} probes: {shown}, most {max(took) * 1000:.1f} ms")
    return of_a_hundred


async def require_health(mesh: Mesh, service: str, work: Callable[[], Awaitable[None]], at_a_time: int) -> str:
    """Have `work` done, and require that the service answers probes meanwhile; return how it did."""
    busy, idle = await health_of(mesh, service), await health_of(mesh, IDLE)
    working = asyncio.gather(*(work() for _ in range(at_a_time)))

    took = await asyncio.gather(*(answer_seconds(channel, working) for channel in (*busy, *idle)))

    await working
    for channel in (*busy, *idle):
        await channel.close()
    nine_of_ten = [each[89] for each in took]
    assert max(nine_of_ten[: len(busy)]) < max(ANSWER_SECONDS, 3 * max(nine_of_ten[len(busy) :])), nine_of_ten
    return ", ".join(f"p{n} {max(each[n - 1] for each in took[: len(busy)]) * 1000:.0f} ms" for n in (50, 90, 99))


@pytest.mark.timeout(300)
async def test_r20_a_worker_answers_probes_while_it_computes(
    mesh: Mesh, person: Person, record_property: Callable[[str, object], None]
) -> None:
    file = await upload(person, photograph())

    widths = itertools.count(4000)  # the same work would be done once

    async def done() -> None:
        operation = {"thumbnails": {"sizes": [{**MUCH, "width": next(widths)} for _ in range(SIZES)]}}
        created = await person.http.post("tasks", json={"inputFileId": file["fileId"], "operation": operation})
        assert (await watched(person.http, created.json()["taskId"]))["state"] == "STATE_SUCCEEDED"

    told = await require_health(mesh, "media-worker", done, at_a_time=2)
    record_property("R-20", f"two tasks of {4 * SIZES} s of pure work at once: health in {told}")
