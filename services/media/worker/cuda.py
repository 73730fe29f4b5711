"""Whether models can run on a CUDA device."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path

_PROVIDER = Path("capi", "libonnxruntime_providers_cuda.so")  # of the package onnxruntime-gpu


def device() -> str:
    """Return the name of the CUDA device; empty without one, or without an ONNX Runtime that can use it."""
    runtime = find_spec("onnxruntime")  # not imported: the worker itself computes nothing
    if runtime is None or runtime.origin is None or not (Path(runtime.origin).parent / _PROVIDER).exists():
        return ""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    number, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(number), 0) or driver.cuDeviceGetName(name, 256, number):
        return ""
    return name.value.decode()
