"""TLS with a ``./run_torchserve.sh --secure`` server: clients trust its one certificate, and that is checked first.

Needs only the standard library.
"""

import os
import re
import ssl
import stat
from pathlib import Path

CIPHERS = "ECDHE-RSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-SHA"  # what TorchServe 0.12 offers, over TLS 1.2 alone
LONE_KEY = re.compile(r"-----BEGIN ([A-Z ]*PRIVATE KEY)-----[^-]+-----END \1-----")
BEGIN, END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


class CertificateError(ValueError):
    """A certificate or key that TorchServe could not serve with; the message says what to do."""


def client_context(kind: type[ssl.SSLContext] = ssl.SSLContext) -> ssl.SSLContext | None:
    """Whom to trust behind https: the one certificate in the file that TORCHSERVE_CERTIFICATE names, if it is set.

    None, the way of any web site, where it is not.
    """
    path = os.environ.get("TORCHSERVE_CERTIFICATE")
    return pin(Path(path), kind) if path else None


def pin(certificate: Path, kind: type[ssl.SSLContext] = ssl.SSLContext) -> ssl.SSLContext:
    """A client's context that accepts the first certificate in a PEM file and no other. Raises CertificateError.

    Names are not compared: who has the key of this very certificate is the server, at whatever address.
    """
    text = certificate.read_text(errors="replace")
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < 0:
        raise CertificateError(f"{certificate} holds no certificate; give a PEM file that begins with {BEGIN}")
    context = kind(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it need not be signed by itself
    try:
        context.load_verify_locations(cadata=text[start : end + len(END)])
    except ssl.SSLError as error:
        raise CertificateError(f"{certificate} holds a damaged certificate ({error.reason})") from error
    return context


def check_pair(certificate: Path, key: Path) -> list[str]:
    """Shake hands in memory as TorchServe will; return the certificate's names. Raises CertificateError, OSError."""
    mode = stat.S_IMODE(key.stat().st_mode)
    if mode & 0o077:
        raise CertificateError(f"{key} has mode {mode:o}, so others can read or change it; run chmod 600 {key}")
    if not LONE_KEY.fullmatch(key.read_text(errors="replace").strip()):
        raise CertificateError(
            f"{key} must hold one PEM private key and nothing else, for TorchServe reads the whole file as the key; "
            f"openssl pkey -in {key} -out ONLY_THE_KEY.pem writes it so"
        )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.maximum_version = ssl.TLSVersion.TLSv1_2
    server.set_ciphers(CIPHERS)
    try:
        # The empty password makes a protected key an error instead of a question.
        server.load_cert_chain(certificate, key, password="")  # nosec B106
    except ssl.SSLError as error:
        reason = error.reason or "a password protects the key, or it is no PEM file"
        raise CertificateError(f"{certificate} and {key} do not load as a pair ({reason})") from error
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = pin(certificate).wrap_bio(incoming, outgoing)
    there = server.wrap_bio(outgoing, incoming, server_side=True)
    try:
        for side in (here, there) * 4:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLCertVerificationError as error:
        raise CertificateError(f"{certificate} is refused by clients: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise CertificateError(f"{key} cannot be used ({error.reason}); TorchServe needs an RSA key") from error
    return [name for _, name in here.getpeercert().get("subjectAltName", ())]


def name_for_clients(names: list[str]) -> str:
    """The host to put into URLs: this machine's own where the certificate has it, else its first name."""
    for name in ("127.0.0.1", "localhost"):
        if name in names:
            return name
    if not names:
        raise CertificateError("the certificate names no host (subjectAltName); clients would refuse it")
    return names[0].replace("*", "torchserve")
