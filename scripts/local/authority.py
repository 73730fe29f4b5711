"""Draws certificates and keys that an installation begins with: the mesh's own authority, and the control plane's name.

Everything else is signed by Consul while it runs.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LIFETIME = timedelta(days=3650)  # the installation's; replaced by whoever replaces the files
_CLOCKS_DIFFER = timedelta(minutes=5)


class Authority:
    """A certificate that signs others, with its key."""

    def __init__(self, name: str, *uris: str) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = (
            _builder(name, self.key, name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(_uris(uris), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        self.certificate_pem = pem(self.certificate)
        self.key_pem = key_pem(self.key)

    def issue(self, name: str, alternatives: Sequence[x509.GeneralName]) -> tuple[str, str]:
        """Return the certificate and the key, in PEM, of a new holder of `alternatives`."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(name, key, self.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return pem(certificate), key_pem(key)


def connect(trust_domain_id: str) -> Authority:
    """Return a root for Consul's Connect CA; `trust_domain_id` is the UUID of the installation's trust domain."""
    return Authority("Atelier mesh", f"spiffe://{trust_domain_id}.consul")


def names(*hosts: str) -> list[x509.GeneralName]:
    """Return names and addresses by which a server is called."""
    found: list[x509.GeneralName] = []
    for host in hosts:
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            found.append(x509.DNSName(host))
    return found


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    # "EC PRIVATE KEY", the form that Consul reads.
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    ).decode()


def _builder(name: str, key: ec.EllipticCurvePrivateKey, issuer: str | bytes) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    public = key.public_key()
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(issuer))]))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + LIFETIME)
        # Consul's own way to name a key; leaves that it signs refer to their root by it.
        .add_extension(x509.SubjectKeyIdentifier(hashlib.sha256(der).digest()), critical=False)
    )


def _uris(uris: Sequence[str]) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
