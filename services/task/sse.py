"""The framing of `text/event-stream` (WHATWG HTML, 9.2): bytes from what a watch yields."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from mesh.errors import MeshError

CONTENT_TYPE = "text/event-stream"
RETRY = b"retry: 1000\n\n"  # milliseconds until a browser that lost its stream comes back
COMMENT = b": nothing new\n\n"  # keeps proxies from taking a quiet stream for a dead one


def event(data: str, *, cursor: str = "", name: str = "") -> bytes:
    """Return one event. `data` is one line; a browser sends the last `cursor` back as `Last-Event-ID`."""
    fields = [("id", cursor), ("event", name), ("data", data)]
    return "".join(f"{field}: {value}\n" for field, value in fields if value).encode() + b"\n"


async def framed(
    news: AsyncIterator[tuple[str, str] | None], *, refusal: Callable[[MeshError], str]
) -> AsyncIterator[bytes]:
    """Frame a watch: its (cursor, data) pairs as events, its None as comments, its failure as `event: error`.

    A failure before the first of them is raised, so that it still becomes a status.
    """
    begun = False
    try:
        async for each in news:
            frame = COMMENT if each is None else event(each[1], cursor=each[0])
            yield frame if begun else RETRY + frame
            begun = True
    except MeshError as error:
        if not begun:
            raise
        yield event(refusal(error), name="error")
        return
    if not begun:
        yield RETRY
