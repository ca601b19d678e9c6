"""Make a certificate for localhost with the Java's keytool: ``python -m src.serving.certificate FOLDER``.

The folder then holds ``made.p12`` and ``made.password`` for TorchServe and ``made.pem`` for clients, all of mode 600. A
certificate that is there already is kept until it is 300 of its 365 days old. JAVA_HOME names the Java. Needs only the
standard library.
"""

import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

from src.serving.tls import CertificateError

KEPT = 300 * 24 * 3600  # seconds
TIMEOUT = 60  # seconds for one run of keytool


def make_certificate(folder: Path, java_home: Path) -> bool:
    """Whether one was made; False when the one made before is kept. Raises CertificateError, OSError."""
    certificate, password = folder / "made.pem", folder / "made.password"
    if certificate.exists() and certificate.stat().st_size and time.time() - certificate.stat().st_mtime < KEPT:
        return False
    for old in folder.glob("made.*"):
        old.unlink()
    password.touch(0o600)
    password.write_text(secrets.token_hex(16))  # in a file: other users see a command's words
    keytool = [java_home / "bin" / "keytool", "-alias", "server", "-keystore", folder / "made.p12"]
    keytool += ["-storetype", "PKCS12", "-storepass:file", password]
    key = ["-genkeypair", "-keyalg", "RSA", "-keysize", "2048", "-validity", "365", "-dname", "CN=localhost"]
    extensions = ["SAN=dns:localhost,ip:127.0.0.1", "KeyUsage=digitalSignature", "ExtendedKeyUsage=serverAuth"]
    run([*keytool, *key, *(word for extension in extensions for word in ("-ext", extension))])
    text = run([*keytool, "-exportcert", "-rfc"])
    certificate.touch(0o600)
    certificate.write_text(text)
    (folder / "made.p12").chmod(0o600)
    return True


def run(command: list[str | Path]) -> str:
    """What the command prints. Raises CertificateError with what it said when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise CertificateError(f"{command[0]} made no certificate in {TIMEOUT} s; try again") from error
    if done.returncode:
        raise CertificateError(f"{command[0]} made no certificate: {(done.stdout + done.stderr).strip()}")
    return done.stdout


def main(folder: str) -> int:
    try:
        if make_certificate(Path(folder), Path(os.environ["JAVA_HOME"])):
            print("==> Made a certificate for localhost")
    except (CertificateError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
