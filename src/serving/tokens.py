"""Print the header with the token of a ``--secure`` server: ``python -m src.serving.tokens inference``.

``curl -H @<(python -m src.serving.tokens inference)`` takes it without showing it to the machine's other users. A token
that has expired (TorchServe's last an hour) is replaced first; ``--renew`` replaces it at once, should it have leaked.
Needs only the standard library.
"""

import argparse
import json
import os
import stat
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from src.serving.client import call
from src.serving.tls import CertificateError

RUN = Path("torchserve/.run")  # what run_torchserve.sh leaves there: key_file.json, management_url, tls/certificate.pem
ON_ITS_WAY = timedelta(seconds=5)
BEING_WRITTEN = 1.0  # seconds for which the file may be half of one: TorchServe writes it in place
RENEWING = threading.Lock()  # of a key that two threads renew at once only the later one is taken


class TokenError(RuntimeError):
    """There is no token that the server would take; the message says why."""


def read_token(kind: str, run: Path = RUN, renew: bool = False, management: str | None = None) -> str:
    """The valid token for ``inference`` or ``management``. Raises TokenError, or OSError where the server refuses.

    ``management``: that API's URL, where ``run`` does not hold it.
    """
    with RENEWING:
        keys = read_keys(run)
        if renew or has_expired(keys[kind]):
            os.environ.setdefault("TORCHSERVE_CERTIFICATE", str(run / "tls" / "certificate.pem"))
            management = management or (run / "management_url").read_text().strip()
            call(f"{management}/token?type={kind}", token=keys["API"]["key"])
            keys = read_keys(run)
            if has_expired(keys[kind]):
                raise TokenError(
                    f"{run}/key_file.json still holds the old {kind} key; run ./run_torchserve.sh --secure"
                )
        return keys[kind]["key"]


def read_keys(run: Path) -> dict:
    """What TorchServe wrote; the file must be its owner's alone. Raises TokenError."""
    path = run / "key_file.json"
    if not path.exists():
        raise TokenError(f"{path} does not exist; start the server with ./run_torchserve.sh --secure")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise TokenError(f"{path} has mode {mode:o}, so others may know the keys; start the server again")
    deadline = time.monotonic() + BEING_WRITTEN
    while True:
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            if time.monotonic() > deadline:
                raise TokenError(f"{path} is not whole ({error}); start the server again") from error
            time.sleep(BEING_WRITTEN / 20)


def has_expired(key: dict[str, str]) -> bool:
    """Whether TorchServe no longer takes the key, or will not when a request with it arrives."""
    return datetime.fromisoformat(key["expiration time"]) < datetime.now(UTC) + ON_ITS_WAY


def add_token(parser: argparse.ArgumentParser, kind: str) -> None:
    """The option for the ``inference`` or ``management`` key. The environment keeps it from who lists processes."""
    variable = f"TORCHSERVE_{kind.upper()}_TOKEN"
    parser.add_argument(
        f"--{kind}-token",
        default=os.environ.get(variable, ""),
        help=f"the {kind} key of a --secure server; better in {variable}, for others can see a command line",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("inference", "management"))
    parser.add_argument("--renew", action="store_true", help="replace the token; the old one is refused from then on")
    parser.add_argument("--run", type=Path, default=RUN, help="the server's folder; default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        print(f"Authorization: Bearer {read_token(arguments.kind, arguments.run, arguments.renew)}")
    except (TokenError, CertificateError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
