"""Gives messages that no handler could take back to their queue: `python -m mesh.redrive user.events`.

Run it once what was wrong is mended. `ATELIER_BROKER_URL` names the broker.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence

from opentelemetry import propagate, trace

from mesh import broker
from mesh.errors import MeshError


async def redrive(url: str, queue: str) -> int:
    """Give back what lies in a queue's dead letters now, saying what each is; return how many."""
    count = 0
    async with broker.opened(url) as bus:
        async for letter in bus.redrive(queue):
            span = trace.get_current_span(propagate.extract(letter.headers)).get_span_context()
            _say(
                f"{letter.message_id or '-'}  {letter.type}"
                + (f"  trace {span.trace_id:032x}" if span.is_valid else "")
            )
            count += 1
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mesh.redrive", description="Give messages that no handler could take back to their queue."
    )
    parser.add_argument("queue", help="where they were, e.g. user.events; its dead letters are in user.events.dead")
    options = parser.parse_args(arguments)
    if "ATELIER_BROKER_URL" not in os.environ:
        parser.error("ATELIER_BROKER_URL is not set")
    try:
        count = asyncio.run(redrive(os.environ["ATELIER_BROKER_URL"], options.queue))
    except MeshError as refusal:
        sys.stderr.write(f"{options.queue}: {refusal.message}\n")
        return 1
    _say(f"{count} messages are in {options.queue} again.")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
