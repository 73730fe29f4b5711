"""Sets the wall clocks of media workers wrong: Python finds this at its start where this folder is on its path.

It reaches what is written in Python. What reads the kernel's clock in C goes by the right time: TLS, which judges
certificates by it, and gRPC's core, so that gRPC's deadlines are left right, too.
"""

import datetime as dt
import os
import time
from types import SimpleNamespace

OFF_SECONDS = {"media-worker-1": 600.0, "media-worker-2": -600.0}


def set_wrong(seconds: float) -> None:
    from grpc.aio import _utils as deadlines  # noqa: PLC0415 - by those alone whose clock is wrong

    right, right_ns, Right = time.time, time.time_ns, dt.datetime  # noqa: N806 - a class
    deadlines.time = SimpleNamespace(time=right)  # type: ignore[assignment]  # all it uses of it
    time.time = lambda: right() + seconds
    time.time_ns = lambda: right_ns() + int(seconds * 1_000_000_000)

    class Datetimes(type):
        """Takes for a datetime what was made before, or in C."""

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, Right)

    class Wrong(Right, metaclass=Datetimes):  # type: ignore[misc, valid-type]  # known at run time only
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:
            return Right.fromtimestamp(time.time(), tz)

    dt.datetime = Wrong  # type: ignore[misc]  # that is the purpose


if os.environ.get("ATELIER_INSTANCE") in OFF_SECONDS:
    set_wrong(OFF_SECONDS[os.environ["ATELIER_INSTANCE"]])
