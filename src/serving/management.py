"""What a running TorchServe says of a model: versions, workers, queue, metrics, and whether it can answer."""

import json
import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from src.serving.client import Refused, call, send

LOAD_ATTEMPTS = 2  # TorchServe itself goes on for five minutes
SLOW = 180  # seconds for what loads or removes workers


class NotReady(RuntimeError):
    """The server cannot answer for this model yet; the message says why.

    ``workers``: the (worker id, PID) pairs that were not READY, where the server answered.
    """

    workers: frozenset[tuple[str, int]] = frozenset()


class NotRegistered(NotReady):
    """The server is up and does not know the model; waiting does not help."""


@dataclass(frozen=True)
class Service:
    """A model of a running TorchServe: where its three APIs answer, and the keys of a --secure server."""

    model: str = "fashion_mnist"
    inference: str = "http://127.0.0.1:8080"
    management: str = "http://127.0.0.1:8081"
    metrics: str = "http://127.0.0.1:8082"
    management_token: str = ""
    inference_token: str = ""

    def manage(self, path: str = "", method: str | None = None, **options) -> bytes:
        """Call ``/models/MODEL`` + ``path`` of the management API. Raises OSError."""
        return call(
            f"{self.management}/models/{self.model}{path}", token=self.management_token, method=method, **options
        )

    def predict(self, body: bytes, version: str = "", content_type: str = "application/json") -> dict:
        """The answer for one image, of the default version unless one is named. Raises OSError or ValueError."""
        url = f"{self.inference}/predictions/{self.model}" + (f"/{quote(version)}" if version else "")
        return json.loads(send(url, body, content_type, self.inference_token))

    def register(self, query: str) -> None:
        """Register an archive of the model store: its file name, and ``&`` options if any. Raises OSError."""
        call(f"{self.management}/models?url={query}", token=self.management_token, method="POST", timeout=SLOW)

    def describe(self, version: str = "") -> dict:
        """TorchServe's description of ``version``, or of the default one. Raises OSError."""
        return json.loads(self.manage(f"/{quote(version)}" if version else ""))[0]

    def versions(self) -> dict[str, dict]:
        """The description of every registered version. Raises OSError."""
        return {description["modelVersion"]: description for description in json.loads(self.manage("/all"))}

    def scrape(self) -> str:
        """What the metrics API answers. Raises OSError."""
        return call(f"{self.metrics}/metrics").decode()

    def total(self, metric: str, **labels: str) -> float:
        """``total`` of a metric now. Raises OSError."""
        return total(self.scrape(), metric, **labels)


def total(scraped: str, metric: str, **labels: str) -> float:
    """The sum over those series of a Prometheus metric that have ``labels``; 0 where there is none."""
    series = re.findall(rf"^{metric}\{{(.*)\}} (\S+)$", scraped, re.MULTILINE)
    wanted = [f'{name}="{value}"' for name, value in labels.items()]
    return sum(float(value) for found, value in series if all(label in found for label in wanted))


def check_ready(service: Service, version: str = "") -> int:
    """How many workers are READY, at least minWorkers. Raises NotReady.

    ``/ping`` does not tell: TorchServe says Healthy while workers still load, and with no model at all.
    """
    try:
        description = service.describe(version)
    except Refused as error:
        raise (NotRegistered if error.status == 404 else NotReady)(str(error)) from error
    except (OSError, ValueError) as error:
        raise NotReady(f"{service.management} does not answer ({error})") from error
    ready = count_ready(description)
    if ready < max(1, description["minWorkers"]):
        not_ready = NotReady(f"{ready} of {description['minWorkers']} workers of {service.model} are READY")
        not_ready.workers = frozenset(
            (worker["id"], worker["pid"])
            for worker in description["workers"]
            if worker["status"] != "READY" and worker["pid"] > 0
        )
        raise not_ready
    return ready


def count_ready(description: dict) -> int:
    """The READY workers of one version."""
    return sum(worker["status"] == "READY" for worker in description["workers"])


def wait_ready(service: Service, timeout: float, version: str = "", process: int | None = None) -> int:
    """Poll ``check_ready`` for ``timeout`` seconds. Raises NotReady.

    Gives up early when ``process`` (a PID) has ended, or a worker has died LOAD_ATTEMPTS times while it loads.
    """
    deadline = time.monotonic() + timeout
    seen: set[tuple[str, int]] = set()
    while True:
        try:
            return check_ready(service, version)
        except NotRegistered:
            raise
        except NotReady as error:
            if process is not None and not _alive(process):
                raise NotReady(f"the server's process {process} has ended") from error
            seen |= error.workers
            if any(count > LOAD_ATTEMPTS for count in Counter(worker for worker, _ in seen).values()):
                raise NotReady(
                    f"a worker of {service.model} died {LOAD_ATTEMPTS} times while it loaded the model"
                ) from error
            if time.monotonic() > deadline:
                raise NotReady(f"not ready after {timeout:.0f} s: {error}") from error
            time.sleep(0.2)


def _alive(process: int) -> bool:
    command = Path(f"/proc/{process}/cmdline")
    if command.exists():
        return command.read_bytes() != b""  # a process that ended and was not reaped has none
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def status(service: Service) -> dict:
    """Versions, workers, queue and readiness as one JSON object. Raises OSError."""
    default = service.describe()["modelVersion"]
    versions = [
        {
            "version": version,
            "default": version == default,
            "archive": description["modelUrl"],
            "ready": count_ready(description) >= max(1, description["minWorkers"]),
            "pending_requests": description["jobQueueStatus"]["pendingRequests"],
            "queue_left": description["jobQueueStatus"]["remainingCapacity"],
            "workers": [
                {"id": worker["id"], "state": worker["status"], "pid": worker["pid"], "memory": worker["memoryUsage"]}
                for worker in description["workers"]
            ],
        }
        for version, description in service.versions().items()
    ]
    ready = any(version["ready"] for version in versions if version["default"])
    return {"model": service.model, "ready": ready, "versions": versions}


def show_status(found: dict) -> str:
    """``status`` as a table; memory in megabytes."""
    lines = [f"{found['model']} is {'ready' if found['ready'] else 'not ready'}"]
    for version in found["versions"]:
        mark = " (default)" if version["default"] else ""
        waiting = f"{version['pending_requests']} requests wait, room for {version['queue_left']} more"
        lines.append(f"version {version['version']}{mark}  {version['archive']}  {waiting}")
        lines += [
            f"  worker {worker['id']}  {worker['state']}  PID {worker['pid']}  {worker['memory'] / 1e6:.0f} MB"
            for worker in version["workers"]
        ]
    return "\n".join(lines)
