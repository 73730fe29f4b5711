"""A mesh's authority for tests: real certificates, as Consul would sign them, without Consul."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import grpc
from cryptography import x509

from mesh import certificates
from mesh.certificates import CERTIFICATE, KEY, PRESENT, ROOTS, Leaf, Pems
from scripts.local import authority, configs

TRUST_DOMAIN = "11111111-2222-3333-4444-555555555555"
HOST = "127.0.0.1"


class TestAuthority:
    """Signs leaves. Its leaves name an address, too, so that a plain gRPC client can be told whom to expect."""

    __test__ = False

    def __init__(self, trust_domain: str = TRUST_DOMAIN) -> None:
        self.trust_domain = trust_domain
        self.root = authority.connect(trust_domain)

    def pems(self, service: str, *, roots: str | None = None) -> Pems:
        """Return a new certificate of a service; it trusts this authority unless told otherwise."""
        name = x509.UniformResourceIdentifier(f"spiffe://{self.trust_domain}.consul/ns/default/dc/dc1/svc/{service}")
        certificate, key = self.root.issue(service, [name, *authority.names(HOST)])
        return Pems(certificate.encode(), key.encode(), (roots or self.root.certificate_pem).encode())

    def leaf(self, service: str, folder: Path) -> Leaf:
        """Write a new certificate of a service to `folder`, as `certificates.kept` does, and return it."""
        pems = self.pems(service)
        certificates.write(folder, pems)
        return Leaf(folder, pems)


@cache
def _shared() -> tuple[TestAuthority, Path]:
    folder = Path(tempfile.mkdtemp(prefix="atelier-identity-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return TestAuthority(), folder


@cache
def leaf(service: str) -> Leaf:
    """Return a service's certificate by the authority that all tests of this process share."""
    shared, folder = _shared()
    return shared.leaf(service, folder / service)


def grpc_client(pems: Pems) -> grpc.ChannelCredentials:
    """Return what a plain gRPC client shows and trusts."""
    return grpc.ssl_channel_credentials(pems.roots, pems.key, pems.certificate)


def envoy_tls(own: Leaf, folder: Path, authority: Path | None = None) -> dict:
    """Return the transport socket by which an Envoy under test reaches the control plane as `own`.

    Args:
        own: its certificate.
        folder: is given leaf.json and roots.json.
        authority: who vouches for the control plane, where it is not the one of all tests.
    """
    for name, secret in configs.edge_secrets(own.folder).items():
        (folder / f"{name}.json").write_text(json.dumps({"resources": [secret]}))
    newest = own.folder / PRESENT
    return {
        "name": "tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": {
                "alpn_protocols": ["h2"],
                "tls_certificates": [
                    {
                        "certificate_chain": {"filename": str(newest / CERTIFICATE)},
                        "private_key": {"filename": str(newest / KEY)},
                    }
                ],
                "validation_context": {"trusted_ca": {"filename": str(authority or newest / ROOTS)}},
            },
        },
    }
