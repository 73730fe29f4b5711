"""What operators see: log lines in JSON, and traces over OTLP. Names stand in docs/telemetry.md."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime

from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode

from mesh import VERSION, context

SAMPLED = 0.01  # of the traces that begin here; full sampling takes a quarter of the throughput

_tracer = trace.get_tracer("atelier.mesh", VERSION)
_NO_SPAN = nullcontext()
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, what `extra` gave, request and trace."""

    def __init__(self, service: str, instance: str) -> None:
        super().__init__()
        self._names = {"service": service, "instance": instance}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            **self._names,
            "logger": record.name,
            "message": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        if (request := context.present()) is not None:
            line["request_id"] = request.request_id
        if present := trace_id():
            line["trace_id"] = present
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def inject(carrier: dict[str, str]) -> None:
    """Put the present trace, if there is one, into what goes along with a call."""
    if trace.get_current_span().get_span_context().is_valid:
        propagate.inject(carrier)


def trace_id() -> str:
    """Return the present trace's id in hexadecimal; empty when there is none."""
    span = trace.get_current_span().get_span_context()
    return f"{span.trace_id:032x}" if span.is_valid else ""


def configure(service: str, instance: str) -> None:
    """Send logs to standard error, and spans to `OTEL_EXPORTER_OTLP_ENDPOINT` when that is set."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service, instance))
    logging.basicConfig(level=os.environ.get("ATELIER_LOG_LEVEL", "INFO"), handlers=[handler], force=True)
    for chatty in ("aiormq", "aio_pika", "alembic"):  # they log each retry, with addresses
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        provider = TracerProvider(
            resource=Resource.create(
                {"service.name": service, "service.instance.id": instance, "service.version": VERSION}
            ),
            sampler=ParentBased(TraceIdRatioBased(float(os.environ.get("ATELIER_TRACES_SAMPLED", SAMPLED)))),
        )
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(provider)


def _tracing() -> bool:
    return isinstance(trace.get_tracer_provider(), TracerProvider)


def server_span(method: str, metadata: Mapping[str, str]) -> AbstractContextManager[None]:
    """Return what holds the span of one served call, a child of the caller's (OpenTelemetry's rpc conventions).

    Whoever ends the call badly says so by `failed`, within it, so that what is logged of that belongs to the trace.
    """
    if "traceparent" in metadata or _tracing():
        return _span(method, metadata)
    return _NO_SPAN  # nothing to tell, nothing to pass on: not worth 20 µs a call


@contextmanager
def _span(method: str, metadata: Mapping[str, str]) -> Iterator[None]:
    service, _, name = method.strip("/").partition("/")
    with _tracer.start_as_current_span(
        f"{service}/{name}",
        context=propagate.extract(metadata),
        kind=SpanKind.SERVER,
        attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
        record_exception=False,  # its text may hold what must not be kept
        set_status_on_exception=False,
    ):
        yield


def failed(reason: str) -> None:
    """Say in the present span why its call ends badly."""
    trace.get_current_span().set_status(Status(StatusCode.ERROR, reason))
