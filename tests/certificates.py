"""Certificates as an operator would bring them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

PEM = serialization.Encoding.PEM
PLAIN = serialization.NoEncryption()


def write_pair(
    folder: Path, names=("shop.test",), *, days: int = 30, elliptic: bool = False, password: bytes = b""
) -> tuple[Path, Path]:
    """A self-signed certificate for ``names`` and its key, as two PEM files; expired where ``days`` is negative."""
    key = ec.generate_private_key(ec.SECP256R1()) if elliptic else rsa.generate_private_key(65537, 2048)
    who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
    today = datetime.now(UTC)
    builder = x509.CertificateBuilder(who, who, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(today - timedelta(days=60)).not_valid_after(today + timedelta(days=days))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(list(map(x509.DNSName, names))), critical=False)
    encryption = serialization.BestAvailableEncryption(password) if password else PLAIN
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(PEM))
    paths[1].write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, encryption))
    paths[1].chmod(0o600)
    return paths
