"""Stop taking requests and answer those taken: what TorchServe 0.12, which closes every connection, does not do."""

import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from src.serving.management import Service, count_ready
from src.serving.scaling import DRAINING, HOLD, hold_and_do, waiting


def drain(service: Service, store: Path, seconds: float, say: Callable) -> bool:
    """True once every request that was taken is answered; False when some are not after ``seconds``. Raises OSError.

    A version without workers becomes the default, so that new requests get 503 at once, while the workers of the
    others answer what is in their queues. It is for a server that stops next: nothing puts the old default back.
    """
    deadline = time.monotonic() + seconds
    versions = service.versions()
    if DRAINING not in versions:
        register_without_workers(service, store)
    service.manage(f"/{DRAINING}/set-default", "PUT")
    say("new requests are refused (503)")
    for version in versions.keys() - {DRAINING}:
        if not refuse(service, version, deadline):
            left = waiting(service.describe(version))
            say(f"after {seconds:g} s version {version} is still busy; {left} requests wait in its queue")
            return False
    say("every request that was taken is answered")
    return True


def refuse(service: Service, version: str, deadline: float) -> bool:
    """True once every worker of ``version`` has answered all it took and answers 503 to the rest; False if not by
    ``deadline`` (time.monotonic()). Raises OSError.

    A request that names the version reaches its workers whatever the default is, and TorchServe 0.12 would unregister
    it with all that waits in its queue. So each worker is told (torchserve/handler.py), by a request that comes after
    those in the queue and holds it until the others have been told, too.
    """
    hold = HOLD / 8
    while not hold_and_do(service, version, count_ready(service.describe(version)), lambda: True, hold, refuse="True"):
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        hold = min(HOLD / 2, 2 * hold, left)  # short at first, for callers wait meanwhile; longer where batches are
    while waiting(service.describe(version)):  # what came while they were held
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
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
    return store / f"{model}-{DRAINING}.mar"


def write_empty_archive(store: Path, model: str) -> None:
    """Write an archive that holds nothing but a name; where that fails nothing is left of it. Raises OSError."""
    named = {"modelName": model, "modelVersion": DRAINING, "handler": "handler.py"}
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
