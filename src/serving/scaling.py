"""Fewer or more workers, and versions taken away, without losing a request."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import quote

from src.serving.client import Refused
from src.serving.management import SLOW, NotReady, Service, count_ready, wait_ready

HOLD = 3.0  # seconds that workers wait while others are removed; at most MAX_HOLD of torchserve/handler.py
QUIET = 1.0  # seconds without a request after which a version is taken to be unused
DRAINING = "draining"  # the version without workers that src/serving/draining.py makes the default


def describe_default(service: Service) -> dict:
    """TorchServe's description of the default version. Raises OSError, and NotReady when the server is drained: the
    default then has nothing that a worker could run, and the workers of the others refuse what they get."""
    default = service.describe()
    if default["modelVersion"] == DRAINING:
        raise NotReady(
            f"{service.model} is drained and its server is to stop; start it again: ./run_torchserve.sh with the same "
            "options, or docker restart"
        )
    return default


def scale(service: Service, workers: int) -> int:
    """Set the number of workers and wait until they are ready; return it. Raises NotReady or OSError.

    TorchServe 0.12 removes a worker in the middle of its batch: it interrupts the worker's thread and puts the batch
    back into the queue, and where the thread is faster those requests answer 500. So before it removes any,
    every worker is given a request of ours that keeps it from taking another (``hold`` in torchserve/handler.py).
    Requests wait meanwhile, a quarter of HOLD as a rule, longer where batches take long, and none is lost.

    Not ``synchronous=true``: the thread that waits then is one of the few that take requests, and its clients wait too.
    """
    default = describe_default(service)
    version, current = default["modelVersion"], len(default["workers"])
    if workers < current:
        with suppress(NotReady):  # a worker that still loads cannot be held; one that cannot load need not be
            wait_ready(service, SLOW)
        remove_workers(service, version, current, workers)
        return wait_ready(service, SLOW)
    set_workers(service, version, current, workers)
    try:
        return wait_ready(service, SLOW)
    except NotReady as error:
        if workers == current:
            raise
        remove_workers(service, version, workers, current)
        raise NotReady(f"{error}; the number of workers is {current} again") from error


def remove_workers(service: Service, version: str, current: int, wanted: int) -> None:
    """``wanted`` workers instead of ``current``, while those that are READY are held. Raises NotReady or OSError."""

    def change() -> bool:
        set_workers(service, version, current, wanted)
        return True

    for hold in (HOLD / 4, HOLD / 2, HOLD):  # short at first, for callers wait meanwhile
        if hold_and_do(service, version, count_ready(service.describe(version)), change, hold):
            return
    raise NotReady(f"the workers of {service.model} stay busy; none was removed, try again with less traffic")


def set_workers(service: Service, version: str, current: int, wanted: int) -> None:
    """Ask for ``wanted`` workers instead of ``current``, and again when that removed only one of them. Raises OSError.

    Two threads of TorchServe 0.12 give up the requests of a worker that goes, also those of ``hold``, and where both do
    so at once it answers 500, a NullPointerException. That worker is gone, the others are not.
    """
    for _ in range(max(1, current - wanted)):
        try:
            service.manage(f"/{quote(version)}?min_worker={wanted}&max_worker={wanted}", "PUT", timeout=SLOW)
        except Refused as error:
            if not is_race(error):
                raise
        else:
            return


def unregister(service: Service, version: str) -> None:
    """Unregister ``version``, whose workers are held. Raises OSError.

    All but one worker go first: where ``set_workers`` would ask again, the version is gone and its other workers stay.
    """
    set_workers(service, version, len(service.describe(version)["workers"]), 1)
    try:
        service.manage(f"/{quote(version)}", "DELETE", timeout=SLOW)
    except Refused as error:
        if not is_race(error):
            raise


def is_race(error: Refused) -> bool:
    """Whether TorchServe removed a worker and stumbled then."""
    return error.status == 500 and "NullPointerException" in str(error)


def hold_and_do(
    service: Service, version: str, workers: int, action: Callable[[], bool], hold: float, **headers: str
) -> bool:
    """``action()`` while every worker of ``version`` is held, ``hold`` seconds at most; False, without it, when they
    are not all held in half of that. ``headers``: more of the request that holds a worker."""
    before, until = service.total("Holds", ModelName=service.model), time.time() + hold
    headers["hold-until"] = str(until)
    with ThreadPoolExecutor(max(1, workers)) as requests:
        for _ in range(workers):
            requests.submit(service.manage, f"/{quote(version)}?customized=true", timeout=hold, headers=headers)
        while service.total("Holds", ModelName=service.model) < before + workers:
            if time.time() > until - hold / 2:
                return False
            time.sleep(0.05)
        return action()


def do_when_idle(service: Service, version: str, seconds: float, action: Callable[[], bool]) -> bool:
    """``action()`` once ``version``, no longer the default, has answered all it took; False if not within ``seconds``.

    Nobody may have asked for it by its number for QUIET seconds, its queue must be empty, and every READY worker
    held: a worker takes our request only after it has answered its batch.
    """
    deadline, hold = time.monotonic() + seconds, HOLD / 8

    def asked() -> float:
        return service.total("ts_inference_requests_total", model_name=service.model, model_version=version)

    def is_idle(before: float) -> bool:
        return asked() == before and waiting(service.describe(version)) == 0

    while True:
        before = asked()
        time.sleep(QUIET)
        if is_idle(before):
            workers = count_ready(service.describe(version))
            if hold_and_do(service, version, workers, lambda before=before: is_idle(before) and action(), hold):
                return True
            hold = min(HOLD, 2 * hold)  # short at first, for callers wait meanwhile; longer where batches take long
        if time.monotonic() > deadline:
            return False


def waiting(description: dict) -> int:
    """The requests in the queue of one version."""
    return description["jobQueueStatus"]["pendingRequests"]
