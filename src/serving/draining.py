"""Stop taking requests and answer those taken: what TorchServe 0.12, which closes every connection, does not do."""

import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from src.serving.management import Service
from src.serving.scaling import QUIET, do_when_idle, waiting

VERSION = "draining"


def drain(service: Service, store: Path, seconds: float, say: Callable) -> bool:
    """True once every request that was taken is answered; False when some are not after ``seconds``. Raises OSError.

    A version without workers becomes the default, so that new requests get 503 at once, while the workers of the
    others answer what is in their queues. It is for a server that stops next: nothing puts the old default back.
    """
    versions = service.versions()
    if VERSION not in versions:
        register_without_workers(service, store)
    service.manage(f"/{VERSION}/set-default", "PUT")
    say("new requests are refused (503)")
    deadline = time.monotonic() + seconds
    for version in versions:
        if version == VERSION:
            continue
        if not do_when_idle(service, version, deadline - time.monotonic(), lambda: True, QUIET / 5):
            left = waiting(service.describe(version))
            say(f"after {seconds:g} s version {version} is still asked for or busy; {left} requests wait in its queue")
            return False
    say("every request that was taken is answered")
    return True


def register_without_workers(service: Service, store: Path) -> None:
    """Register an empty archive: the one in ``store``, as in an image, or one that is there for that moment only."""
    archive = empty_archive(store, service.model)
    made = not archive.exists()
    if made:
        write_empty_archive(store, service.model)
    try:
        service.register(f"{quote(archive.name)}&initial_workers=0")
    finally:
        if made:
            archive.unlink()


def empty_archive(store: Path, model: str) -> Path:
    """Where the archive of the version without workers lies."""
    return store / f"{model}-{VERSION}.mar"


def write_empty_archive(store: Path, model: str) -> None:
    """Write an archive that holds nothing but a name; where that fails nothing is left of it. Raises OSError."""
    named = {"modelName": model, "modelVersion": VERSION, "handler": "handler.py"}
    archive = empty_archive(store, model)
    partial = archive.with_name(f".{archive.name}.part")
    try:
        with zipfile.ZipFile(partial, "w") as opened:
            manifest = {"createdOn": "01/01/1980 00:00:00", "runtime": "python", "model": named}
            opened.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
            opened.writestr("handler.py", "")
        partial.replace(archive)
    finally:
        partial.unlink(missing_ok=True)
