"""The process that has the models: `python -m services.media.worker.inference`, begun by the worker.

It sees numbers only, never a picture's file. What the operations of several tasks ask is computed together, in batches
as large as the memory allows: on a CUDA device where ONNX Runtime can use one, else on the CPU, by the same code.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from mesh.errors import Internal, InvalidArgument, MeshError
from services.media.domain import Model, ModelUnusable, OutOfMemory
from services.media.operations.models import Pixels
from services.media.worker import cuda, free_batch, weights
from services.media.worker.batches import Batches
from services.media.worker.confined import confine
from services.media.worker.models import LENGTH, MAX_HEADER_BYTES, body_bytes, packed

ITEMS_PER_PROCESS = 500  # then a fresh one: whatever libraries leak is bounded
MAX_ITEMS = 64  # of one request
_NO_MEMORY = ("alloc", "out of memory", "cuda error 2", "cublas_status_alloc_failed")  # as ONNX Runtime and CUDA put it

log = logging.getLogger(__name__)


class ItemsMalformed(InvalidArgument):
    reason = "ITEMS_MALFORMED"


class Loaded:
    """One model, ready to compute.

    Args:
        model: what it is.
        content: its weights.
        memory_bytes: most that it may take of the device.
        on_cuda: compute on the CUDA device.
    """

    def __init__(self, model: Model, content: bytes, *, memory_bytes: int, on_cuda: bool) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised, too
        # A plan of the memory, made anew for each size of batch, holds half as much again as is needed.
        options.enable_mem_pattern = False
        providers: list[Any] = ["CPUExecutionProvider"]
        if on_cuda:
            onnxruntime.preload_dlls()  # CUDA's own libraries, where they are Python packages
            memory = {"gpu_mem_limit": memory_bytes, "arena_extend_strategy": "kSameAsRequested"}
            providers.insert(0, ("CUDAExecutionProvider", memory))
        try:
            self._session = onnxruntime.InferenceSession(free_batch.made_free(content), options, providers)
        except Exception as failure:
            raise _understood(failure, model) from failure
        self._model = model
        self._input = self._session.get_inputs()[0].name
        self._output = self._session.get_outputs()[0].name  # of several, as U²-Net has them, the first is the best
        self.shape = (3, model.side_px, model.side_px)

    def compute(self, items: Sequence[Pixels]) -> Sequence[Pixels]:
        """Return what comes out of each item, both of shape (channels, rows, columns).

        Raises:
            OutOfMemory: the batch is too large.
            ModelUnusable: it does not compute, or what its description says it would not.
        """
        try:
            (made,) = self._session.run([self._output], {self._input: np.stack(items)})
        except Exception as failure:
            raise _understood(failure, self._model) from failure
        _require_as_described(made, len(items), self._model)
        return list(made)


def _understood(failure: Exception, model: Model) -> MeshError:
    if isinstance(failure, MemoryError) or any(sign in str(failure).lower() for sign in _NO_MEMORY):
        return OutOfMemory("The model needs more memory than there is.", metadata={"model": model.name})
    return ModelUnusable(f"The model {model.name} {model.version} does not compute.", metadata={"model": model.name})


def _require_as_described(made: Any, count: int, model: Model) -> None:
    """Raise ModelUnusable unless `made` is what `domain.Model` says of a model's output."""
    shape = np.shape(made)
    channels, side_px = (3, model.side_px * model.scale) if model.operation == "upscale" else (1, None)
    sides = shape[2:] if side_px is None else (side_px, side_px)
    if len(shape) != 4 or 0 in shape or shape != (count, channels, *sides):
        fault = f"gives {shape} where {(count, channels, side_px or 'rows', side_px or 'columns')} is wanted"
    elif not np.isfinite(made).all():
        fault = "gives what is no number"
    else:
        return
    raise ModelUnusable(
        f"The model {model.name} {model.version} {fault}.", metadata={"model": model.name, "version": model.version}
    )


class Inference:
    """Answers those who connect to a socket, until it has computed enough or meets the end of its memory.

    Args:
        folder: where the weights are.
        memory_bytes: most that the models may take, of the process or of the CUDA device.
        batch: most items in a batch.
        batch_seconds: how long the first item of a batch waits for others.
        compute_seconds: a batch that takes longer ends the process.
        items: how many it computes in its life.
    """

    def __init__(
        self,
        folder: Path,
        *,
        memory_bytes: int,
        batch: int,
        batch_seconds: float,
        compute_seconds: float,
        items: int = ITEMS_PER_PROCESS,
        on_cuda: bool = False,
    ) -> None:
        self._folder = folder
        self._models = {model.name: model for model in weights.described(folder)}
        self._memory_bytes = memory_bytes
        self._batch = batch
        self._batch_seconds = batch_seconds
        self._compute_seconds = compute_seconds
        self._left = items
        self._on_cuda = on_cuda
        # On a CUDA device a second batch is copied there while the first is computed.
        self._at_once = 2 if on_cuda else 1
        self._threads = ThreadPoolExecutor(self._at_once + 1)
        self._loading = asyncio.Lock()
        self._loaded: dict[str, tuple[Loaded, Batches[Pixels, Pixels]]] = {}
        self._enough = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, listening: socket.socket) -> None:
        """Serve until this process should be replaced; whoever connects after that waits for the next one."""
        enough, answering = asyncio.create_task(self._enough.wait()), set[asyncio.Task[None]]()
        while not self._enough.is_set():
            accepting = asyncio.create_task(asyncio.get_running_loop().sock_accept(listening))
            await asyncio.wait([accepting, enough], return_when=asyncio.FIRST_COMPLETED)
            if not accepting.done():
                accepting.cancel()
                break
            connection, _ = accepting.result()
            answering.add(task := asyncio.create_task(self._answer(connection)))
            task.add_done_callback(answering.discard)
        if answering:
            await asyncio.wait(answering)

    async def _answer(self, connection: socket.socket) -> None:
        _, user, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user != os.getuid():
            connection.close()
            return
        reader, writer = await asyncio.open_connection(sock=connection)
        try:
            name, items = await self._request(reader)
            computing = asyncio.create_task(self._results(name, items))
            # Nothing more is sent: what can be read is the end, of one whose task was cancelled.
            gone = asyncio.create_task(reader.read(1))
            await asyncio.wait([computing, gone], return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if not computing.done():
                computing.cancel()
                return
            header, body = packed({}, computing.result())
        except MeshError as refusal:
            header, body = packed({"refused": [refusal.code_number, refusal.reason, refusal.message]})
            if refusal.__cause__ is not None:
                log.warning("models: %s", refusal.message, exc_info=refusal.__cause__)
            if isinstance(refusal, OutOfMemory):  # what its libraries make of that is known of none of them
                self._enough.set()
        except (OSError, EOFError):
            writer.close()
            return
        except Exception:
            log.exception("models met a bug")
            header, body = packed({"refused": [Internal.code_number, Internal.reason, "The model failed."]})
        try:
            writer.write(header)
            writer.write(body)
            writer.close()
            await writer.wait_closed()  # `drain` leaves a rest to be sent, and this process may end next
        except OSError:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader) -> tuple[str, Pixels]:
        """Read what is asked; nothing is believed of who asks."""
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        if length > MAX_HEADER_BYTES:
            raise ItemsMalformed("The header is too long.")
        try:
            header = json.loads(await reader.readexactly(length))
            model, (count, *shape) = self._models[header["model"]], header["shape"]
        except (ValueError, KeyError, TypeError):
            raise ItemsMalformed("The header makes no sense, or names no model of this worker.") from None
        if shape != [3, model.side_px, model.side_px] or not 1 <= count <= MAX_ITEMS:
            raise ItemsMalformed(
                f"{model.name} takes up to {MAX_ITEMS} items of 3 × {model.side_px} × {model.side_px}."
            )
        body = await reader.readexactly(body_bytes([count, *shape]))
        return model.name, np.frombuffer(body, np.float32).reshape(count, *shape)

    async def _results(self, name: str, items: Pixels) -> Pixels:
        batches = await self._batches(self._models[name])
        self._left -= len(items)
        if self._left <= 0:
            self._enough.set()
        results = [asyncio.create_task(batches.result(item)) for item in items]
        try:
            return np.stack(await asyncio.gather(*results))
        finally:
            for each in results:
                each.cancel()

    async def _batches(self, model: Model) -> Batches[Pixels, Pixels]:
        async with self._loading:
            if model.name not in self._loaded:
                loop = asyncio.get_running_loop()
                loaded = await loop.run_in_executor(self._threads, self._load, model)
                free = (self._memory_bytes - self._taken_bytes()) // self._at_once
                batches = Batches[Pixels, Pixels](
                    self._watched(loaded),
                    self._threads,
                    at_most=max(1, min(self._batch, free // model.item_bytes)),
                    wait_seconds=self._batch_seconds,
                    at_once=self._at_once,
                )
                self._tasks.add(asyncio.create_task(batches.run()))
                self._loaded[model.name] = (loaded, batches)
                log.info("%s %s: up to %d items in a batch", model.name, model.version, batches.at_most)
            return self._loaded[model.name][1]

    def _load(self, model: Model) -> Loaded:
        content = weights.read(self._folder, model)
        return Loaded(model, content, memory_bytes=self._memory_bytes, on_cuda=self._on_cuda)

    def _taken_bytes(self) -> int:
        if self._on_cuda:  # the weights; what ONNX Runtime's kernels need is small beside them
            return sum((self._folder / self._models[name].file).stat().st_size for name in self._loaded)
        return _allocated_bytes()

    def _watched(self, loaded: Loaded) -> Callable[[Sequence[Pixels]], Sequence[Pixels]]:
        """Return `compute`, with an end for one that has none: C code cannot be told to stop."""

        def compute(items: Sequence[Pixels]) -> Sequence[Pixels]:
            timer = threading.Timer(self._compute_seconds, os._exit, [1])
            timer.start()
            try:
                return loaded.compute(items)
            finally:
                timer.cancel()

        return compute


def _allocated_bytes() -> int:
    """Return what RLIMIT_DATA counts."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))


def main(fd: int, folder: Path, *, memory_bytes: int, batch: int, batch_seconds: float, compute_seconds: float) -> None:
    on_cuda = bool(cuda.device())
    # A CUDA driver reserves far more addresses than it uses; there ONNX Runtime keeps the limit.
    confine(None if on_cuda else memory_bytes)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    inference = Inference(
        folder,
        memory_bytes=memory_bytes,
        batch=batch,
        batch_seconds=batch_seconds,
        compute_seconds=compute_seconds,
        on_cuda=on_cuda,
    )
    listening = socket.socket(fileno=fd)
    listening.setblocking(False)
    asyncio.run(inference.run(listening))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[3]))
