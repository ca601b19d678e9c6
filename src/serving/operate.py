"""Ask a running TorchServe whether it can answer: ``python -m src.serving.operate ready --model fashion_mnist``.

Needs only the standard library. ``src.serving.scale`` changes the number of workers.
"""

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

LOAD_ATTEMPTS = 2  # TorchServe itself goes on for five minutes


class NotReady(RuntimeError):
    """The server cannot answer for this model yet; the message says why.

    ``workers``: the (worker id, PID) pairs that were not READY, where the server answered.
    """

    workers: frozenset[tuple[str, int]] = frozenset()


class NotRegistered(NotReady):
    """The server is up and does not know the model; waiting does not help."""


def call(
    url: str,
    data: bytes | None = None,
    content_type: str = "application/json",
    token: str = "",
    method: str | None = None,
    timeout: float = 10,
    headers: dict[str, str] | None = None,
) -> bytes:
    """GET ``url``, or POST ``data`` to it; return the body. Raises OSError when it cannot be reached or refuses."""
    known = {"Content-Type": content_type} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, data=data, headers=known | (headers or {}), method=method)
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read()


def check_ready(management: str, model: str, token: str = "") -> int:
    """How many workers of ``model`` are READY, at least its minWorkers. Raises NotReady.

    ``/ping`` does not tell: TorchServe says Healthy while workers still load, and with no model at all.
    """
    try:
        versions = json.loads(call(f"{management}/models/{model}", token=token))
    except urllib.error.HTTPError as error:
        kind = NotRegistered if error.code == 404 else NotReady
        raise kind(f"{management} answers {error.code} for model {model}: {error.read().decode().strip()}") from error
    except (OSError, ValueError) as error:
        raise NotReady(f"{management} does not answer ({error})") from error
    description = versions[0]
    ready = sum(worker["status"] == "READY" for worker in description["workers"])
    if ready < max(1, description["minWorkers"]):
        not_ready = NotReady(f"{ready} of {description['minWorkers']} workers of {model} are READY")
        not_ready.workers = frozenset(
            (worker["id"], worker["pid"])
            for worker in description["workers"]
            if worker["status"] != "READY" and worker["pid"] > 0
        )
        raise not_ready
    return ready


def wait_ready(management: str, model: str, timeout: float, token: str = "", process: int | None = None) -> int:
    """Poll ``check_ready`` for ``timeout`` seconds. Raises NotReady.

    Gives up early when ``process`` (a PID) has ended, or a worker has died LOAD_ATTEMPTS times while it loads.
    """
    deadline = time.monotonic() + timeout
    seen: set[tuple[str, int]] = set()
    while True:
        try:
            return check_ready(management, model, token)
        except NotRegistered:
            raise
        except NotReady as error:
            if process is not None and not _alive(process):
                raise NotReady(f"the server's process {process} has ended") from error
            seen |= error.workers
            if any(count > LOAD_ATTEMPTS for count in Counter(worker for worker, _ in seen).values()):
                raise NotReady(f"a worker of {model} died {LOAD_ATTEMPTS} times while it loaded the model") from error
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    ready = commands.add_parser("ready", help="exit 0 when at least minWorkers workers are READY")
    ready.add_argument("--management", default="http://127.0.0.1:8081", help="default: %(default)s")
    ready.add_argument("--model", default="fashion_mnist", help="default: %(default)s")
    ready.add_argument("--timeout", type=float, default=0, help="seconds to wait; 0 asks once")
    ready.add_argument("--process", type=int, help="give up when this PID has ended")
    send = commands.add_parser("send", help="send a JSON request and print the answer")
    send.add_argument("file", type=Path)
    send.add_argument("--inference", default="http://127.0.0.1:8080", help="default: %(default)s")
    send.add_argument("--model", default="fashion_mnist", help="default: %(default)s")
    for command in (ready, send):
        command.add_argument("--token", default=os.environ.get("TORCHSERVE_TOKEN", ""), help="for a --secure server")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "ready":
            count = wait_ready(
                arguments.management, arguments.model, arguments.timeout, arguments.token, arguments.process
            )
            print(f"{arguments.model} is ready: {count} worker{'s' if count > 1 else ''}")
        else:
            url = f"{arguments.inference}/predictions/{arguments.model}"
            print(call(url, arguments.file.read_bytes(), token=arguments.token).decode())
    except (NotReady, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
