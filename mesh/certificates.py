"""Who this process is among services: its leaf certificate, its key and the roots it trusts, always the newest.

They are followed in Consul and kept on disk, so that a process is born without Consul, too. Every listener and every
call of the mesh is TLS with certificates on both sides; a peer's name is what its certificate says.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import consul.aio
import grpc
from cryptography import x509

from mesh import discovery
from mesh.config import ServiceConfig

CERTIFICATE, KEY, ROOTS = "certificate.pem", "key.pem", "roots.pem"
PRESENT = "present"
"""The link to the folder in which the newest three lie, for gRPC and Envoy."""
_SPARE_FOLDERS = 2  # the present one, and the one before for whoever is just reading it

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pems:
    """What belongs together, each in PEM: a certificate with its intermediates, its key, and whom to trust."""

    certificate: bytes
    key: bytes
    roots: bytes

    @property
    def leaf(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.certificate)

    @property
    def spiffe_id(self) -> str:
        """Who the certificate is for: `spiffe://<trust domain>/ns/default/dc/<dc>/svc/<service>`."""
        names = self.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return names.get_values_for_type(x509.UniformResourceIdentifier)[0]


class Leaf:
    """The newest certificate of this process, and what TLS needs of it.

    Args:
        folder: where it is kept.
        present: what it is now.
    """

    def __init__(self, folder: Path, present: Pems) -> None:
        self.folder = folder
        self.present = present
        self.spiffe_prefix, _, self.service = present.spiffe_id.rpartition("/")

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Read what `kept` has written to `folder`.

        Raises:
            OSError, ValueError: it is not there, or is none.
        """
        newest = folder / PRESENT
        return cls(folder, Pems(*((newest / name).read_bytes() for name in (CERTIFICATE, KEY, ROOTS))))

    def spiffe_id(self, service: str) -> str:
        """Return how a service of the same mesh is called in its certificate."""
        return f"{self.spiffe_prefix}/{service}"

    def service_of(self, spiffe_id: str) -> str:
        """Return the service that a certificate names; empty for one of no mesh, or another."""
        prefix, _, service = spiffe_id.rpartition("/")
        return service if prefix == self.spiffe_prefix else ""

    def caller(self, call: grpc.aio.ServicerContext[Any, Any]) -> str:
        """Return the service that makes a gRPC call."""
        found = next(iter(call.auth_context().get("peer_spiffe_id", ())), b"")
        return self.service_of(found.decode())

    def grpc_server(self, pair: tuple[bytes, bytes] | None = None) -> grpc.ServerCredentials:
        """Return the credentials of a gRPC server that talks to services of the mesh only.

        Args:
            pair: key and certificate to show, where it is not to be the leaf.
        """
        taken = self.present

        def configuration() -> grpc.ServerCertificateConfiguration:
            shown = pair or (taken.key, taken.certificate)
            return grpc.ssl_server_certificate_configuration([shown], root_certificates=taken.roots)

        def newest() -> Any:  # asked at every handshake; None for no news, which the stubs do not know
            nonlocal taken
            if taken is self.present:
                return None
            taken = self.present
            return configuration()

        return grpc.dynamic_ssl_server_credentials(configuration(), newest, require_client_authentication=True)

    def tls_server(self) -> ssl.SSLContext:
        """Return the context of another server that talks to services of the mesh only."""
        return _Newest.following(self, ssl.PROTOCOL_TLS_SERVER, "")

    def tls_client(self, service: str) -> ssl.SSLContext:
        """Return the context of a client that talks to `service` only, by whatever address."""
        return _Newest.following(self, ssl.PROTOCOL_TLS_CLIENT, self.spiffe_id(service))


class _Checked(ssl.SSLObject):
    """Ends a handshake with somebody else than who was expected, and ends itself without waiting."""

    def do_handshake(self) -> None:
        super().do_handshake()
        expected = self.context.expected  # type: ignore[attr-defined]  # _Present made this object
        if expected and ("URI", expected) not in (self.getpeercert() or {}).get("subjectAltName", ()):
            raise ssl.SSLCertVerificationError(f"the peer is not {expected}")

    def unwrap(self) -> None:
        # A client that idles in a pool does not answer the farewell, and would hold up a listener that stops.
        with contextlib.suppress(ssl.SSLWantReadError):
            super().unwrap()


class _Present(ssl.SSLContext):
    """TLS by some certificates; the peer must have one of the same authority."""

    sslobject_class = _Checked
    expected = ""


class _Newest(ssl.SSLContext):
    """Begins each connection with the newest certificates; those that are open stay."""

    _made: Callable[[], ssl.SSLContext]

    @classmethod
    def following(cls, leaf: Leaf, protocol: int, expected: str) -> Self:
        made: dict[Pems, ssl.SSLContext] = {}

        def newest() -> ssl.SSLContext:
            if leaf.present not in made:
                made.clear()
                made[leaf.present] = _context(leaf, protocol, expected)
            return made[leaf.present]

        context = cls(protocol)
        context._made = newest
        return context

    def wrap_bio(self, *arguments: Any, **named: Any) -> ssl.SSLObject:
        return self._made().wrap_bio(*arguments, **named)


def _context(leaf: Leaf, protocol: int, expected: str) -> ssl.SSLContext:
    context = _Present(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False  # instances come and go under any address; the SPIFFE id is the name
    context.verify_mode = ssl.CERT_REQUIRED
    context.expected = expected
    newest = (leaf.folder / PRESENT).resolve()
    context.load_cert_chain(newest / CERTIFICATE, newest / KEY)
    context.load_verify_locations(cadata=leaf.present.roots.decode())
    return context


def peer_spiffe_id(connection: ssl.SSLObject) -> str:
    """Return the SPIFFE id in the certificate of the far side; empty when there is none."""
    certificate: Any = connection.getpeercert() or {}
    return next((value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"), "")


@asynccontextmanager
async def kept(config: ServiceConfig) -> AsyncIterator[Leaf]:
    """Hold the certificate of this process; waits until there is one, and keeps it fresh."""
    folder = config.data_dir / "identity" / config.instance
    follower = _Follower(folder, config.service)
    async with discovery.connected(config) as client:
        following = asyncio.create_task(follower.run(client))
        try:
            yield await follower.leaf
        finally:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following


class _Follower:
    """Keeps a leaf as Consul has it; `leaf` is there once there is one that can be used."""

    def __init__(self, folder: Path, service: str) -> None:
        self._folder = folder
        self._service = service
        self._certificate: Mapping[str, str] | None = None
        self._roots = b""
        self.leaf: asyncio.Future[Leaf] = asyncio.get_running_loop().create_future()
        with contextlib.suppress(OSError, ValueError):
            leaf = Leaf.of(folder)
            if leaf.service == service and leaf.present.leaf.not_valid_after_utc > datetime.now(UTC):
                self.leaf.set_result(leaf)

    async def run(self, client: consul.aio.Consul) -> None:
        """Follow for ever."""

        async def roots() -> None:
            async for answer in discovery.answers(client, discovery.asking(client, "/v1/agent/connect/ca/roots")):
                self._roots = joined(root["RootCert"] for root in answer["Roots"] or ())
                self._take()

        async def certificate() -> None:
            path = f"/v1/agent/connect/ca/leaf/{self._service}"
            async for answer in discovery.answers(client, discovery.asking(client, path)):
                self._certificate = answer
                self._take()

        async with asyncio.TaskGroup() as group:
            group.create_task(roots())
            group.create_task(certificate())

    def _take(self) -> None:
        if not self._certificate or not self._roots:
            return
        fresh = Pems(self._certificate["CertPEM"].encode(), self._certificate["PrivateKeyPEM"].encode(), self._roots)
        if self.leaf.done() and self.leaf.result().present == fresh:
            return
        try:
            write(self._folder, fresh)
        except OSError:  # a full disk: Consul answers once a minute at least, which is soon enough to try again
            log.exception("the certificate could not be kept; the one before stays")
            return
        if self.leaf.done():
            self.leaf.result().present = fresh
        else:
            self.leaf.set_result(Leaf(self._folder, fresh))
        log.info("has a certificate until %s", fresh.leaf.not_valid_after_utc)


def joined(roots: Iterable[str]) -> bytes:
    """Return certificates as one PEM; Consul gives one back as it was given, perhaps without its last line's end."""
    return "".join(f"{root.strip()}\n" for root in roots).encode()


def write(folder: Path, pems: Pems) -> None:
    """Keep `pems` in `folder`, for this user's eyes only, in one step: no reader sees parts of two."""
    fresh = folder / str(time.time_ns())
    fresh.mkdir(mode=0o700, parents=True)
    for name, content in ((CERTIFICATE, pems.certificate), (KEY, pems.key), (ROOTS, pems.roots)):
        with os.fdopen(os.open(fresh / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
    link = folder / f".{PRESENT}"
    link.unlink(missing_ok=True)
    link.symlink_to(fresh.name)
    link.replace(folder / PRESENT)
    for old in sorted(each for each in folder.iterdir() if each.name.isdecimal())[:-_SPARE_FOLDERS]:
        shutil.rmtree(old, ignore_errors=True)
