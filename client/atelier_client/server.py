"""Where Atelier is: one URL for HTTP and for gRPC, which Envoy tells apart on one port."""

from __future__ import annotations

import http.client
import json
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from atelier_client.version import VERSION

USER_AGENT = f"atelier/{VERSION}"
HTTP_SILENCE_SECONDS = 60.0  # of a connection, before we give it up


@dataclass(frozen=True, slots=True)
class Server:
    """One installation's edge."""

    url: str
    """As given, less what says nothing: the name of its session in the credentials."""
    host: str
    port: int
    tls: bool

    @classmethod
    def parse(cls, url: str) -> Server:
        """Read `http://host[:port]` or `https://host[:port]`.

        Raises:
            ValueError: it is something else.
        """
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ValueError(f"{url} is no server's address; it looks like http://127.0.0.1:8080.")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        return cls(f"{parts.scheme}://{host}:{port}", parts.hostname, port, parts.scheme == "https")

    def http(self) -> http.client.HTTPConnection:
        """Return a connection that opens with its first request."""
        if self.tls:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self.host, self.port, timeout=HTTP_SILENCE_SECONDS, context=context)
        return http.client.HTTPConnection(self.host, self.port, timeout=HTTP_SILENCE_SECONDS)

    def channel(self, services: list[ServiceDescriptor]) -> grpc.aio.Channel:
        """Return a channel that repeats safe calls of `services` while the server is briefly away."""
        target = f"dns:///{self.url.partition('://')[2]}"
        options: list[tuple[str, str | int]] = [
            ("grpc.primary_user_agent", USER_AGENT),
            ("grpc.service_config", json.dumps(_retries(services))),
            ("grpc.enable_http_proxy", 0),  # as http.client: what an address names is where we go
            ("grpc.max_reconnect_backoff_ms", 2_000),  # the default, 2 min, outlasts any restart of a server
            ("grpc.keepalive_time_ms", 30_000),  # a watch over a dead connection would wait for ever
            ("grpc.keepalive_timeout_ms", 10_000),
        ]
        if not self.tls:
            return grpc.aio.insecure_channel(target, options=options)
        # The same authorities as http.client's; gRPC brings its own list otherwise.
        authorities = ssl.get_default_verify_paths().cafile
        roots = Path(authorities).read_bytes() if authorities else None
        return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(roots), options=options)


def _retries(services: list[ServiceDescriptor]) -> dict[str, object]:
    """Return gRPC's service config: what may be repeated is what the contract calls safe to repeat."""
    names = [
        {"service": service.full_name, "method": method.name}
        for service in services
        for method in service.methods
        if _repeatable(method)
    ]
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.2s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return {"methodConfig": [{"name": names, "retryPolicy": policy}]}


def _repeatable(method: MethodDescriptor) -> bool:
    # A refresh is safe too: the server answers a token that was just used once more.
    return bool(
        method.GetOptions().idempotency_level
        or "request_id" in method.input_type.fields_by_name
        or method.name == "RefreshTokens"
    )
