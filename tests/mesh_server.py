"""A service under test: the real server with everything the mesh puts before a handler, without a registry.

async with serving(partial(add_TaskServiceServicer_to_server, servicer)) as server:
    stub = TaskServiceStub(server.channel(user="usr_1"))          # a person, through the edge
    stub = TaskServiceStub(server.channel(caller="media-worker"))  # a service
"""

from __future__ import annotations

import json
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import jwt
from atelier.mesh.v1 import identity_pb2
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from mesh import contract, service
from mesh import http as http_listener
from mesh.channel import MeshChannel
from mesh.contract import Contract
from mesh.identity import Verifier
from mesh.intentions import Intention, Intentions
from tests.authority import grpc_client, leaf

NARROW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_535), ("grpc.use_local_subchannel_pool", 1)]
"""Options of a channel whose streams hold 64 KiB that nobody has read: HTTP/2's own window, which does not grow."""
SERVICE = "storage"
"""Whose certificate the service under test shows; nobody looks at the name, but for the HTTP listener's."""
URL_KEY = "1" * 64
KEY = ec.generate_private_key(ec.SECP256R1())
JWKS = json.dumps({"keys": [{**json.loads(ECAlgorithm.to_jwk(KEY.public_key())), "kid": "test", "alg": "ES256"}]})


def token(user_id: str, role: str = "ROLE_USER", lifetime_seconds: float = 300, **claims: Any) -> str:
    """Return an access token as the auth service would issue it."""
    now = time.time()
    return jwt.encode(
        {
            "iss": "atelier", "aud": "atelier", "sub": user_id, "jti": uuid.uuid4().hex, "sid": "ses_test",
            "gen": f"{user_id}/1", "role": role, "iat": int(now), "exp": int(now + lifetime_seconds), **claims,
        },
        KEY, algorithm="ES256", headers={"kid": "test"},
    )  # fmt: skip


def headers(user: str | None = None, role: str = "ROLE_USER", extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what a call for `user` carries."""
    found = {"x-request-id": "req-test", **(extra or {})}
    if user:
        found["authorization"] = f"Bearer {token(user, role)}"
    return found


class _Channel(MeshChannel):
    def __init__(self, channel: grpc.aio.Channel, metadata: Mapping[str, str]) -> None:
        super().__init__(channel)
        self._carried = list(metadata.items())

    def _metadata(self) -> list[tuple[str, str]]:
        return self._carried


class Server:
    """Where the service under test listens."""

    def __init__(
        self,
        address: str,
        http_url: str,
        admission: service.Admission,
        verifier: Verifier,
        intentions: Intentions,
        stack: AsyncExitStack,
    ) -> None:
        self.address = address
        self.admission = admission
        self.http_url = http_url
        self._verifier = verifier
        self._intentions = intentions
        self._stack = stack
        self._channels: dict[str, grpc.aio.Channel] = {}

    def bare(self, caller: str = "edge", options: Sequence[tuple[str, Any]] = ()) -> grpc.aio.Channel:
        """Return a new channel of plain gRPC: no deadline, no metadata, no errors of ours."""
        return grpc.aio.secure_channel(self.address, grpc_client(leaf(caller).present), options=options)

    def revoke(self, claim: str, value: str) -> None:
        """Revoke, as the identity feed would, the tokens in which a claim has a value."""
        revocation = identity_pb2.Revocation(claim=claim, value=value)
        revocation.expire_time.FromSeconds(int(time.time()) + 300)
        self._verifier.take(JWKS, [revocation])

    def intend(self, *intentions: Intention) -> None:
        """Have these intentions and no others, as Consul would tell."""
        self._intentions.take(intentions)

    def channel(
        self,
        user: str | None = None,
        role: str = "ROLE_USER",
        caller: str = "edge",
        metadata: Mapping[str, str] | None = None,
    ) -> MeshChannel:
        """Return a channel whose calls carry that identity; failures come as mesh.errors."""
        if caller not in self._channels:
            self._channels[caller] = self.bare(caller)
            self._stack.push_async_callback(self._channels[caller].close)
        return _Channel(self._channels[caller], headers(user, role, metadata))

    def tls(self, caller: str = "edge") -> ssl.SSLContext:
        """Return with what `caller` opens connections to the HTTP listener."""
        return leaf(caller).tls_client(SERVICE)


@asynccontextmanager
async def serving(
    *register: service.Register,
    http: Mapping[str, http_listener.Endpoint] | None = None,
    rpcs: Contract | None = None,
    service_name: str = SERVICE,
    reader_seconds: float = service.READER_SECONDS,
) -> AsyncIterator[Server]:
    """Serve on free ports of loopback, with the certificate of `service_name`."""
    own, rpcs = leaf(service_name), rpcs or contract.installed()
    verifier, intentions = Verifier(URL_KEY), Intentions(own)
    verifier.take(JWKS)
    intentions.take([])
    async with AsyncExitStack() as stack:
        admission = service.Admission(verifier, intentions, rpcs, own, reader_seconds=reader_seconds)
        server = grpc.aio.server(handlers=[admission], options=service.OPTIONS)
        for add in register:
            add(admission)
        port = server.add_secure_port("127.0.0.1:0", own.grpc_server())
        await server.start()
        stack.push_async_callback(server.stop, 0)
        http_url = ""
        if http:
            application = http_listener.application(http, verifier, intentions, rpcs)
            port_of_http = await stack.enter_async_context(
                http_listener.listening(application, "127.0.0.1", 0, own, 10)
            )
            http_url = f"https://127.0.0.1:{port_of_http}"
        yield Server(f"127.0.0.1:{port}", http_url, admission, verifier, intentions, stack)
