"""Waiting for something to become true, never a sleep of a guessed length."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any


async def eventually(check: Callable[[], Any | Awaitable[Any]], within_seconds: float = 5.0) -> Any:
    """Return what `check` returns as soon as it is true; fail with its last answer or exception."""
    deadline = time.monotonic() + within_seconds
    last: object = None
    while True:
        try:
            last = check()
            if inspect.isawaitable(last):
                last = await last
            if last:
                return last
        except Exception as error:
            last = error
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_seconds} s: {getattr(check, '__name__', check)} gave {last!r}")
        await asyncio.sleep(0.02)
