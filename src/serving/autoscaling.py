"""As many workers as the load needs, which TorchServe 0.12 does not see to by itself.

The rule is that of Kubernetes' Horizontal Pod Autoscaler, with its terms: desired = ceil(current * metric / target), a
tolerance, at most twice as many at a time, and a stabilisation window before there are fewer.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from src.serving.client import Refused
from src.serving.lock import Busy, locked
from src.serving.management import NotReady, Service, count_ready, total
from src.serving.retiring import with_valid_keys
from src.serving.scaling import describe_default, scale, waiting
from src.serving.tokens import TokenError

TOLERANCE = 0.1  # a metric this far from its target is at it
HEADROOM = 0.7  # of the requests/s that a number of workers did not carry it is trusted with
MEMORY = 3600  # seconds after which a number of workers is tried again whatever it did not carry


@dataclass(frozen=True)
class Look:
    """What a server says at one moment of the default version; the counters are those since its start."""

    time: float  # seconds, of a clock that only goes on
    version: str
    pids: tuple[int, ...]  # of the workers
    ready: bool  # all of them
    batch_size: int
    waiting: int  # requests in the queue
    requests: float
    queue_us: float  # that all requests together spent in the queue

    @property
    def workers(self) -> int:
        return len(self.pids)


@dataclass(frozen=True)
class Load:
    """What came between two looks, and how long it waited for a worker."""

    rate: float  # requests a second
    wait_ms: float  # mean
    waiting: int  # requests in the queue at the end

    def __str__(self) -> str:
        return f"{self.rate:.1f} requests/s waited {self.wait_ms:.1f} ms on average, {self.waiting} wait now"


@dataclass
class Rule:
    """Decides the number of workers, and remembers what was too much for fewer. ``quiet``: the window, in seconds."""

    least: int
    most: int
    target_ms: float
    quiet: float
    version: str = ""
    calm_since: float | None = None
    too_much: dict[int, tuple[float, float]] = field(default_factory=dict)  # by workers: requests/s, and when

    def decide(self, look: Look, load: Load | None) -> int:
        """The number of workers from now on; ``load`` is None where nothing can be said of it."""
        if look.version != self.version:
            self.version, self.too_much = look.version, {}
        bounded = min(max(look.workers, self.least), self.most)
        if bounded != look.workers or load is None or not look.ready:
            self.calm_since = None
            return bounded
        wanted = desired(look.workers, load, self.target_ms, look.batch_size)
        if wanted > look.workers:
            self.too_much[look.workers] = load.rate, look.time
        if wanted >= look.workers or not self.would_do(look.workers - 1, load, look.time):
            self.calm_since = None
            return min(max(wanted, look.workers), self.most)
        self.calm_since = look.time if self.calm_since is None else self.calm_since
        return look.workers - (look.time - self.calm_since >= self.quiet and look.workers > self.least)

    def would_do(self, workers: int, load: Load, now: float) -> bool:
        """Whether so few may carry the load: it is well below what was too much for them, or that is long ago."""
        rate, when = self.too_much.get(workers, (math.inf, now))
        return load.rate <= HEADROOM * rate or now - when > MEMORY


def desired(workers: int, load: Load, target_ms: float, batch_size: int) -> int:
    """What the load asks for by the mean wait or, where that is more, by the queue, of which each worker is to take one
    batch: nobody who still waits is in the mean."""
    ratio = max(load.wait_ms / target_ms, load.waiting / (workers * batch_size))
    if abs(ratio - 1) <= TOLERANCE:
        return workers
    return min(2 * workers, max(1, math.ceil(workers * ratio)))


def look_at(service: Service) -> Look:
    """Raises NotReady when the server is drained, or OSError."""
    default = describe_default(service)
    version, pids = default["modelVersion"], tuple(worker["pid"] for worker in default["workers"])
    scraped = service.scrape()

    def of_version(metric: str) -> float:
        # TorchServe counts a request that names no version under "default".
        return sum(
            total(scraped, metric, model_name=service.model, model_version=name) for name in ("default", version)
        )

    return Look(
        time.monotonic(),
        version,
        pids,
        count_ready(default) == len(pids),
        default["batchSize"],
        waiting(default),
        of_version("ts_inference_requests_total"),
        of_version("ts_queue_latency_microseconds"),
    )


def load_between(before: Look | None, after: Look) -> Load | None:
    """None where two looks cannot be compared: the default is another version, a worker is another one, or the server
    was started again and counts from 0."""
    if before is None or (before.version, before.pids) != (after.version, after.pids):
        return None
    requests, queue_us = after.requests - before.requests, after.queue_us - before.queue_us
    if requests < 0 or queue_us < 0:
        return None
    left = requests + before.waiting - after.waiting  # the queue; only their waits are in the counter
    return Load(requests / (after.time - before.time), queue_us / 1000 / left if left > 0 else 0.0, after.waiting)


def autoscale(service: Service, run: Path, rule: Rule, interval: float, say: Callable) -> None:
    """Look at the server every ``interval`` seconds and scale as ``rule`` says, until a signal ends the process.

    Where the server does not answer, or is drained, it says so once and looks on: another one may follow. So it does
    where a worker is not READY. Raises Refused when it answers 4xx, which does not pass, also to keys that were read
    once more, and OSError when the lock in ``run`` cannot be written.
    """
    before, silent, unready, refused = None, False, False, False
    while True:
        try:
            valid = with_valid_keys(service, run)
            after = look_at(valid)
            if not after.ready and not unready:
                say(f"{datetime.now():%F %T} a worker of {service.model} is not READY; until then no load counts")
            silent, unready, load = False, not after.ready, load_between(before, after)
            workers, before = rule.decide(after, load), after
            if workers != after.workers:
                before = None  # what waited for the change is no measure: one interval goes by unseen
                change(valid, run, after.workers, workers, load, say)
            refused = False
        except Busy:
            pass  # a deploy, rollback, drain or scale is at work
        except (Refused, ConnectionError, TimeoutError, NotReady, TokenError) as error:
            if isinstance(error, Refused) and error.status < 500:
                if refused:
                    raise
                refused, before = True, None
                continue
            if not silent:
                say(f"{datetime.now():%F %T} {error}; looking on")
            silent, before = True, None
        time.sleep(interval)


def change(service: Service, run: Path, current: int, workers: int, load: Load | None, say: Callable) -> None:
    """Scale under the lock and say why. Raises Busy when another holds it, NotReady or OSError."""
    with locked(run):
        scale(service, workers)
    say(f"{datetime.now():%F %T} workers of {service.model}: {current} -> {workers} ({load or 'by --min and --max'})")
