"""How operations reach the process that has the models: a socket, a request each, numbers and no pickles.

A message is a header in JSON and what its `shape` says of float32. Either side may be gone at any time.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from mesh.errors import BY_CODE_NUMBER, Internal
from services.media.domain import Model, ModelMissing, WorkerCrashed
from services.media.operations.models import Pixels

LENGTH = struct.Struct(">I")
MAX_HEADER_BYTES = 64 * 1024


def packed(header: dict[str, Any], items: Pixels | None = None) -> tuple[bytes, memoryview]:
    """Return a message: its header, and its numbers, which are not copied."""
    shape = [] if items is None else items.shape
    text = json.dumps({**header, "shape": shape}).encode()
    body = memoryview(b"") if items is None else np.ascontiguousarray(items, np.float32).data.cast("B")
    return LENGTH.pack(len(text)) + text, body


def body_bytes(shape: Sequence[int]) -> int:
    """Return how many bytes follow a header; nothing where it says no shape."""
    return 4 * math.prod(shape) if shape else 0


class RemoteModels:
    """Satisfies `operations.models.Models`: asks the worker's process that has them.

    Args:
        address: of its socket, in Linux's abstract namespace.
        models: what the worker's manifest lists.
    """

    def __init__(self, address: str, models: Sequence[Model]) -> None:
        self._address = address
        self._models = models

    def model(self, operation: str) -> Model:
        for model in self._models:
            if model.operation == operation:
                return model
        raise ModelMissing(f"This worker has no model for {operation}.", metadata={"operation": operation})

    def run(self, model: Model, items: Pixels) -> Pixels:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(f"\0{self._address}")
                for part in packed({"model": model.name}, items):
                    connection.sendall(part)
                with connection.makefile("rb") as stream:
                    (length,) = LENGTH.unpack(_exactly(stream, LENGTH.size))
                    header = json.loads(_exactly(stream, length))
                    body = _exactly(stream, body_bytes(header["shape"]))
        except (OSError, EOFError) as failure:
            raise WorkerCrashed("The process that computes with the model died.") from failure
        if "refused" in header:
            code, reason, message = header["refused"]
            refusal = BY_CODE_NUMBER.get(code, Internal)(message)
            refusal.reason = reason
            raise refusal
        return np.frombuffer(body, np.float32).reshape(header["shape"])


def _exactly(stream: Any, count: int) -> bytes:
    found: bytes = stream.read(count)
    if len(found) < count:
        raise EOFError
    return found
