"""Calls to other services: a gRPC channel over xDS that carries the present request along.

It sets the deadline, says for whom it calls, carries the trace, turns a failure back into the
error that the far side raised, and stops the far side when its caller stops. Balancing, retries and
health are gRPC's own, configured by the control plane.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

import grpc

from mesh import context, contract, status, telemetry
from mesh.certificates import CERTIFICATE, KEY, PRESENT, ROOTS, Leaf
from mesh.config import ServiceConfig
from mesh.errors import DeadlineExceeded, Unavailable
from mesh.urls import SIGNATURE_KEY

PROVIDER = "mesh"
"""By which the control plane refers to our certificates."""
AUTHORITY = "mesh"
"""Of the names by which gRPC's clients ask the control planes for what they need, see `xds_name`."""
REFRESH_INTERVAL = "2s"  # a look at three small files; roots overlap for days

OPTIONS = [
    # Notices a peer that went away without a word; servers permit it (mesh.service).
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 5_000),
]

RETRY_AFTER_SECONDS = 1.0  # what is away is usually back, or replaced, within a second or so

log = logging.getLogger(__name__)


class ServiceUnavailable(Unavailable):
    reason = "SERVICE_UNAVAILABLE"


@asynccontextmanager
async def opened(service: str, config: ServiceConfig, leaf: Leaf) -> AsyncIterator[grpc.aio.Channel]:
    """Hold a channel to a service by its name; its first call connects. Both sides show certificates.

    Generated async stubs work on it. Their calls raise `mesh.errors` only.
    """
    os.environ.update(environment(config, leaf))  # read once, at the first channel
    # The control plane says which certificates and which peer; without its word nothing is trusted.
    credentials = grpc.xds_channel_credentials(grpc.ssl_channel_credentials(leaf.present.roots))
    async with grpc.aio.secure_channel(f"xds:///{service}", credentials, options=OPTIONS) as channel:
        yield MeshChannel(channel)


def environment(config: ServiceConfig, leaf: Leaf) -> dict[str, str]:
    """Return what gRPC's xDS client must find in the environment of its process."""
    return {
        "GRPC_XDS_BOOTSTRAP_CONFIG": json.dumps(bootstrap(config, leaf)),
        "GRPC_EXPERIMENTAL_XDS_ENDPOINT_FALLBACK": "true",  # obey fallback_on_reachability_only (gRFC A95)
    }


def xds_name(kind: str, name: str) -> str:
    """Return how the resource `name` of a message type is called by gRPC's clients; plain ones have no authority."""
    return f"xdstp://{AUTHORITY}/{kind}/{name}"


def bootstrap(config: ServiceConfig, leaf: Leaf) -> dict[str, Any]:
    """Return what gRPC's xDS client must know: where the control plane is, and where our certificates are."""
    newest = leaf.folder / PRESENT
    own = {
        "certificate_file": str(newest / CERTIFICATE),
        "private_key_file": str(newest / KEY),
        "refresh_interval": REFRESH_INTERVAL,
    }
    # The control plane's own certificate has a host's name, which gRPC asks for here, and an authority of its own.
    plane = {**own, "ca_certificate_file": str(config.secrets_dir / "ads-ca.pem")}
    servers = [
        {
            "server_uri": address.strip(),
            "channel_creds": [{"type": "tls", "config": plane}],
            "server_features": ["xds_v3"],
        }
        for address in config.control_addresses.split(",")
    ]
    provider = {"plugin_name": "file_watcher", "config": {**own, "ca_certificate_file": str(newest / ROOTS)}}
    return {
        "xds_servers": servers,
        "node": {"id": config.instance, "cluster": config.service, "locality": {"zone": config.zone}},
        "certificate_providers": {PROVIDER: provider},
        # Otherwise whoever has all he asked for would never turn to the next control plane, and hear of no change while
        # his own is away. Only names of an authority can be told so.
        "authorities": {AUTHORITY: {"fallback_on_reachability_only": True}},
        "client_default_listener_resource_name_template": xds_name("envoy.config.listener.v3.Listener", "%s"),
    }


class MeshChannel(grpc.aio.Channel):
    """A channel whose calls belong to the present request.

    Not interceptors: grpc.aio runs each intercepted call as a task of its own, which costs more than all
    that is done here.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        inner = self._channel.unary_unary(method, *args, **kwargs)
        policy_seconds = contract.installed().methods[method].deadline_seconds

        async def call(request: Any, *, timeout: float | None = None) -> Any:  # noqa: ASYNC109 - gRPC's own name
            seconds = _seconds(policy_seconds, timeout)
            try:
                return await inner(request, timeout=seconds, metadata=self._metadata())
            except grpc.aio.AioRpcError as error:
                raise _error(error, method) from None

        return call

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        inner = self._channel.unary_stream(method, *args, **kwargs)
        policy_seconds = contract.installed().methods[method].deadline_seconds

        async def call(request: Any, *, timeout: float | None = None) -> AsyncIterator[Any]:  # noqa: ASYNC109 - likewise
            responses = inner(request, timeout=_seconds(policy_seconds, timeout), metadata=self._metadata())
            try:
                async for response in responses:
                    yield response
            except grpc.aio.AioRpcError as error:
                raise _error(error, method) from None
            finally:
                responses.cancel()  # leaving the loop early must end the far side too

        return call

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{method}: no contract of ours streams requests")

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{method}: no contract of ours streams requests")

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def _metadata(self) -> list[tuple[str, str]]:
        return outgoing_metadata()


def outgoing_metadata() -> list[tuple[str, str]]:
    """Return what a call must carry, as metadata or HTTP headers, lower-case keys."""
    carrier: dict[str, str] = {}
    telemetry.inject(carrier)
    request = context.present()
    if request is not None:
        carrier["x-request-id"] = request.request_id
        if request.user is not None and request.user.signature:
            carrier[SIGNATURE_KEY] = request.user.signature
        elif request.user is not None:
            carrier["authorization"] = f"Bearer {request.user.token}"
    return list(carrier.items())


def _seconds(policy_seconds: float, wanted_seconds: float | None) -> float:
    """Return the shortest of the policy's deadline, the caller's wish and what its own caller left it."""
    left = context.seconds_left()
    seconds = min(each for each in (policy_seconds, wanted_seconds, left) if each is not None)
    if seconds <= 0:
        raise DeadlineExceeded("The time for this call ran out before its next step.")
    return seconds


def _error(error: grpc.aio.AioRpcError, method: str) -> Exception:
    trailers = tuple(error.trailing_metadata() or ())
    failure = status.from_call(error.code(), error.details(), trailers)
    if isinstance(failure, Unavailable) and not any(key == status.DETAILS_KEY for key, _ in trailers):
        # Said by gRPC, not by the service: it tells of balancers and sockets, which are nothing to a person.
        service = contract.installed().methods[method].owner
        log.info("%s did not reach its service: %s", method, failure.message)
        return ServiceUnavailable(
            f"The service {service} is not there at the moment; try again.",
            metadata={"service": service},
            retry_after_seconds=RETRY_AFTER_SECONDS,
        )
    return failure
