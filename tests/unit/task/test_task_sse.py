"""The framing of server-sent events."""

from collections.abc import AsyncIterator

import pytest

from mesh.errors import MeshError, NotFound, Unauthenticated
from services.task import sse


async def news(*items: tuple[str, str] | MeshError | None) -> AsyncIterator[tuple[str, str] | None]:
    for item in items:
        if isinstance(item, MeshError):
            raise item
        yield item


async def framed(*items: tuple[str, str] | MeshError | None) -> list[bytes]:
    return [frame async for frame in sse.framed(news(*items), refusal=lambda error: error.reason)]


async def test_each_change_is_an_event_with_its_cursor():
    frames = await framed(("1", "{}"), ("2", '{"a":"é"}'))

    assert frames == [b"retry: 1000\n\nid: 1\ndata: {}\n\n", 'id: 2\ndata: {"a":"é"}\n\n'.encode()]


async def test_quiet_times_are_filled_with_comments():
    assert await framed(("1", "{}"), None) == [b"retry: 1000\n\nid: 1\ndata: {}\n\n", b": nothing new\n\n"]


async def test_a_stream_that_has_nothing_to_say_is_one_nevertheless():
    assert await framed() == [b"retry: 1000\n\n"]


async def test_a_bad_end_is_the_last_event():
    frames = await framed(("1", "{}"), Unauthenticated("late"))

    assert frames[1:] == [b"event: error\ndata: UNAUTHENTICATED\n\n"]


async def test_a_refusal_before_the_first_event_stays_a_status():
    with pytest.raises(NotFound):
        await framed(NotFound("none"))
