"""Set the number of workers of a running TorchServe: ``python -m src.serving.scale --workers 4``.

``PUT /models/NAME?min_worker=N`` does the same, but loses requests when it removes workers; this does not.
"""

import argparse
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from src.serving.operate import NotReady, call, wait_ready

HOLD = 3.0  # seconds that workers wait while others are removed; at most MAX_HOLD of torchserve/handler.py
TIMEOUT = 180  # seconds for new workers to load


def scale(management: str, metrics: str, model: str, workers: int, token: str = "") -> int:
    """Set the number of workers and wait until they are ready; return it. Raises NotReady or OSError.

    TorchServe 0.12 removes a worker in the middle of its batch: it interrupts the worker's thread and puts the batch
    back into the queue, and where the thread is faster those requests answer 500. So before it removes any,
    every worker is given a request of ours that keeps it from taking another (``hold`` in torchserve/handler.py).
    Requests wait meanwhile, HOLD seconds at most, and none is lost.

    Not ``synchronous=true``: the thread that waits then is one of the few that take requests, and its clients wait too.
    """
    current = len(json.loads(call(f"{management}/models/{model}", token=token))[0]["workers"])
    address = f"{management}/models/{model}?min_worker={workers}&max_worker={workers}"
    if workers >= current:
        call(address, token=token, method="PUT", timeout=TIMEOUT)
    else:
        wait_ready(management, model, TIMEOUT, token)  # a worker that still loads cannot be held
        for _ in range(3):
            if hold_and_call(management, metrics, model, current, address, token):
                break
        else:
            raise NotReady(f"the workers of {model} stay busy; none was removed, try again with less traffic")
    return wait_ready(management, model, TIMEOUT, token)


def hold_and_call(management: str, metrics: str, model: str, workers: int, address: str, token: str) -> bool:
    """PUT ``address`` while every worker is held; False, and no PUT, when they are not all held soon enough."""
    before, until = count_holds(metrics, model, token), time.time() + HOLD
    description = f"{management}/models/{model}?customized=true"
    with ThreadPoolExecutor(workers) as requests:
        for _ in range(workers):
            requests.submit(call, description, token=token, timeout=HOLD, headers={"hold-until": str(until)})
        while count_holds(metrics, model, token) < before + workers:
            if time.time() > until - HOLD / 2:
                return False
            time.sleep(0.05)
        call(address, token=token, method="PUT", timeout=TIMEOUT)
        return True


def count_holds(metrics: str, model: str, token: str = "") -> int:
    """How often a worker of ``model`` was held since the server started."""
    pattern = rf'^Holds\{{.*ModelName="{re.escape(model)}".*\}} (\S+)$'
    return int(sum(map(float, re.findall(pattern, call(f"{metrics}/metrics", token=token).decode(), re.MULTILINE))))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--management", default="http://127.0.0.1:8081", help="default: %(default)s")
    parser.add_argument("--metrics", default="http://127.0.0.1:8082", help="default: %(default)s")
    parser.add_argument("--model", default="fashion_mnist", help="default: %(default)s")
    parser.add_argument("--token", default=os.environ.get("TORCHSERVE_TOKEN", ""), help="management key of --secure")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error(f"--workers is {arguments.workers}; it must be at least 1")
    try:
        count = scale(arguments.management, arguments.metrics, arguments.model, arguments.workers, arguments.token)
    except (NotReady, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.model} has {count} worker{'s' if count > 1 else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
