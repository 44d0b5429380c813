"""Certificates for tests: a CA, and what it signs. Real ones, made by `cryptography`; nothing is kept.

ca = Authority("test")
cert, key = ca.issue(tmp_path, "localhost", names=["localhost", "127.0.0.1"])"""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)
PEM = serialization.Encoding.PEM


def subject(common: str, organization: str | None = None) -> x509.Name:
    """O before CN, as they stand in a certificate: CN=common,O=organization in the order of RFC 4514."""
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization)] if organization else []
    return x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, common)])


class Authority:
    """A CA of its own."""

    def __init__(self, common: str) -> None:
        self.name, self._key = subject(common), ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._signed(self.name, self._key.public_key(), [], True)

    def write(self, folder: Path, name: str = "ca") -> Path:
        """The CA's certificate as a file."""
        file = folder / f"{name}.pem"
        file.write_bytes(self.certificate.public_bytes(PEM))
        return file

    def issue(
        self,
        folder: Path,
        name: str,
        who: x509.Name | None = None,
        names: Sequence[str] = ("localhost", "127.0.0.1"),
        password: bytes | None = None,
        expired: bool = False,
    ) -> tuple[Path, Path]:
        """Certificate and key as the files NAME.pem and NAME.key."""
        key = ec.generate_private_key(ec.SECP256R1())
        signed = self._signed(
            subject(name) if who is None else who, key.public_key(), names, False, expired
        )
        cert, private = folder / f"{name}.pem", folder / f"{name}.key"
        cert.write_bytes(signed.public_bytes(PEM))
        sealed = (
            serialization.BestAvailableEncryption(password)
            if password
            else serialization.NoEncryption()
        )
        private.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, sealed))
        return cert, private

    def context(self, *certificate: Path) -> ssl.SSLContext:
        """A client that trusts this CA alone, and shows `certificate` (and its key) if asked."""
        context = ssl.create_default_context(
            cadata=self.certificate.public_bytes(PEM).decode("ascii")
        )
        if certificate:
            context.load_cert_chain(*certificate)
        return context

    def _signed(
        self,
        who: x509.Name,
        key: ec.EllipticCurvePublicKey,
        names: Sequence[str],
        ca: bool,
        expired: bool = False,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(who)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 3 * DAY)
            .not_valid_after(now + (-DAY if expired else DAY))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(list(map(_alternative, names))), critical=not who
            )
        return builder.sign(self._key, hashes.SHA256())


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
