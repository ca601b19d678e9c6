"""A version that no longer is the default goes, once it has answered all it took."""

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, urlsplit

from src.serving.management import Service
from src.serving.scaling import do_when_idle, unregister
from src.serving.tokens import read_token

RETIRE = 30  # seconds to wait until nobody asks for the old version by its number


def with_valid_keys(service: Service, run: Path) -> Service:
    """``service`` with new keys for those that have expired, where it is the --secure server of ``run``: an hour may
    pass while a version is watched. Raises TokenError, ValueError or OSError.

    The port tells: this machine has several names, and whoever has another certificate gets no request.
    """
    kinds = [kind for kind in ("management", "inference") if getattr(service, f"{kind}_token")]
    address = run / "management_url"
    if not kinds or not address.is_file():
        return service
    started, asked = urlsplit(address.read_text().strip()), urlsplit(service.management)
    if (asked.scheme, asked.port) != ("https", started.port):
        return service
    return replace(service, **{f"{kind}_token": read_token(kind, run) for kind in kinds})


def retire_or_say(service: Service, run: Path, version: str, say: Callable) -> None:
    """``retire``, or say that the version stays: another one serves by now, whatever becomes of this one."""
    try:
        retire(with_valid_keys(service, run), version, say)
    except (OSError, RuntimeError, ValueError, SystemExit) as error:  # SystemExit: the command was told to end
        say(f"version {version} stays registered ({error}); later: {curl(service, 'DELETE', version)}")


def curl(service: Service, method: str, path: str) -> str:
    """The command that does ``method`` to a version, for a --secure server with its certificate and a valid key."""
    words = ["curl"]
    if certificate := os.environ.get("TORCHSERVE_CERTIFICATE"):
        words += ["--cacert", shlex.quote(certificate)]
    if service.management_token:
        words += ["-H", f"@<({shlex.quote(sys.executable)} -m src.serving.tokens management)"]
    return " ".join([*words, "-X", method, f"{service.management}/models/{service.model}/{quote(path)}"])


def retire(service: Service, version: str, say: Callable) -> None:
    """Unregister a version that is no longer the default, once it has answered all it took."""

    def remove() -> bool:
        unregister(service, version)
        return True

    if not do_when_idle(service, version, RETIRE, remove):
        say(
            f"version {version} stays registered: it is still asked for by its number; "
            f"later: {curl(service, 'DELETE', version)}"
        )
        return
    say(f"version {version} is unregistered")
