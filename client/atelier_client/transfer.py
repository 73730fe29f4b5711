"""Bytes over HTTP/1.1: an upload or a download in a thread, which ends when its caller is cancelled."""

from __future__ import annotations

import asyncio
import io
import socket
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import BinaryIO, TypeVar

from atelier_client.errors import AtelierError, Unreachable, from_response
from atelier_client.server import USER_AGENT, Server

CHUNK_BYTES = 256 * 1024
_REFUSAL_BYTES = 64 * 1024  # more of an error's body than any of ours has

T = TypeVar("T")
OnBytes = Callable[[int, int], None]
"""Takes bytes done and bytes in all; the latter is 0 when unknown."""


async def uploaded(
    server: Server, target: str, headers: Mapping[str, str], source: BinaryIO, on_bytes: OnBytes
) -> bytes:
    """Post all of `source`, and return the body of the answer.

    Raises:
        AtelierError: what the server refused with, or Unreachable.
    """
    tell = _in_loop(on_bytes)

    def run(connection: HTTPConnection) -> bytes:
        size_bytes = source.seek(0, io.SEEK_END)
        connection.putrequest("POST", target)
        for name, value in {"user-agent": USER_AGENT, "content-length": str(size_bytes), **headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        try:
            sent = 0
            source.seek(0)
            while chunk := source.read(CHUNK_BYTES):
                connection.send(chunk)
                sent += len(chunk)
                tell(sent, size_bytes)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server refused before it had read everything; the answer says why
        return _accepted(connection.getresponse()).read()

    return await _in_thread(server, run)


async def downloaded(server: Server, target: str, headers: Mapping[str, str], sink: BinaryIO, on_bytes: OnBytes) -> int:
    """Write the body of `target` to `sink`, and return its length, bytes.

    Raises:
        AtelierError: what the server refused with, or Unreachable, also when the body breaks off; or that nobody
            reads `sink`.
    """
    tell = _in_loop(on_bytes)

    def run(connection: HTTPConnection) -> int:
        connection.request("GET", target, headers={"user-agent": USER_AGENT, **headers})
        response = _accepted(connection.getresponse())
        size_bytes = int(response.headers.get("content-length") or 0)
        received = 0
        while chunk := response.read(CHUNK_BYTES):
            _write(sink, chunk)
            received += len(chunk)
            tell(received, size_bytes)
        if received < size_bytes:  # http.client does not say so when it reads in pieces
            raise HTTPException(f"{received} of {size_bytes} bytes came")
        return received

    return await _in_thread(server, run)


def _write(sink: BinaryIO, chunk: bytes) -> None:
    try:
        sink.write(chunk)
    except BrokenPipeError as error:  # not the server's connection
        raise AtelierError("Whoever was to read the result went away.", reason="OUTPUT_CLOSED") from error


def _accepted(response: HTTPResponse) -> HTTPResponse:
    if response.status < 400:
        return response
    headers = {name.lower(): value for name, value in response.getheaders()}
    raise from_response(response.status, headers, response.read(_REFUSAL_BYTES))


def _in_loop(on_bytes: OnBytes) -> OnBytes:
    """Return a callback for a thread that calls `on_bytes` where its owner runs."""
    loop = asyncio.get_running_loop()

    def tell(done: int, size: int) -> None:
        loop.call_soon_threadsafe(on_bytes, done, size)

    return tell


async def _in_thread(server: Server, run: Callable[[HTTPConnection], T]) -> T:
    connection = server.http()
    sockets: list[socket.socket] = []  # http.client forgets its own once the answer's end is known

    def guarded() -> T:
        try:
            connection.connect()
        except OSError as error:
            raise Unreachable(server.url, error.strerror or str(error)) from error
        sockets.append(connection.sock)
        try:
            return run(connection)
        except (ConnectionError, TimeoutError, ssl.SSLError, HTTPException) as error:
            raise Unreachable(server.url, str(error)) from error

    running = asyncio.get_running_loop().run_in_executor(None, guarded)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes the thread, which then ends
        await asyncio.wait([running])
        running.exception()  # asked for, so that nobody reports it as lost
        raise
    finally:
        connection.close()
