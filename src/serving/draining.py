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
    """Register an archive that holds nothing but a name; its file is there only while TorchServe reads it."""
    archive = store / f"{service.model}-{VERSION}.mar"
    model = {"modelName": service.model, "modelVersion": VERSION, "handler": "handler.py"}
    with zipfile.ZipFile(archive, "w") as opened:
        manifest = {"createdOn": "01/01/1980 00:00:00", "runtime": "python", "model": model}
        opened.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        opened.writestr("handler.py", "")
    try:
        service.register(f"{quote(archive.name)}&initial_workers=0")
    finally:
        archive.unlink()
