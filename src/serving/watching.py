"""A new version before it serves for good: as a canary it has turns with the old one first, then all of the time; its
requests are watched meanwhile."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from src.serving.golden import Item, answer_golden
from src.serving.management import Service, check_ready
from src.serving.retiring import with_valid_keys
from src.serving.shares import Counts, Doubt, Shares, count_answers, count_doubt, shares, too_few, worse

TURN, SHORTEST = 5.0, 0.5  # seconds in which a canary and the old version are the default once each; of one of them
PAUSE = 0.05  # seconds between two requests of ours
LOOK = 1.0  # seconds between two looks at the old version while we ask nothing
REPORTED = 1.0  # seconds after which workers have told what they answered; REPORT_EVERY of src/inference/report.py


class RolloutError(RuntimeError):
    """The version was not rolled out, and the one before it serves; the message says why."""


class Watch(NamedTuple):
    """``stages``: the shares of the time for which the new version is the default, the last one 1.0; each is watched
    for ``seconds``."""

    seconds: float
    stages: tuple[float, ...] = (1.0,)


def turn(share: float) -> float:
    """The seconds in which a version with this share of the time and the old one are the default once each."""
    return max(TURN, SHORTEST / min(share, 1 - share)) if share < 1 else TURN


@dataclass
class Trial:
    """A new version beside the old one, both READY; ``run`` and ``items``: the server's folder and the golden set."""

    service: Service
    run: Path
    items: list[Item]
    old: str
    new: str
    say: Callable
    sent: int = 0  # our requests in this turn of the new version

    def introduce(self, watch: Watch, before: Shares) -> None:
        """Make the new version the default, stage by stage; ``before``: of the requests before that, to the old one.

        Raises RolloutError, NotReady, OSError or ValueError when it is worse in one of them.
        """
        for share in watch.stages:
            self.set_default(self.new)
            self.say(f"version {self.new} is the default" + (f" {100 * share:g}% of the time" if share < 1 else ""))
            if watch.seconds:
                before = self.observe(share, watch.seconds, before)

    def set_default(self, version: str) -> None:
        """From now on ``version`` answers whoever names none. Raises OSError."""
        self.service = with_valid_keys(self.service, self.run)
        self.service.manage(f"/{quote(version)}/set-default", "PUT")

    def observe(self, share: float, seconds: float, before: Shares) -> Shares:
        """Watch one stage; return what became of the requests to the old version: ``before`` where it had no turn.

        TorchServe cannot split what comes to the default address, but it can change the default between two requests.
        So both versions get what comes in the same minutes, and are compared by that.
        """
        old, tried, alone, own = before, Counts(), Counts(), Doubt()
        begun = {version: count_doubt(self.service, version) for version in (self.old, self.new)}
        both, items, deadline = turn(share), cycle(self.items), time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            counts, doubt = self.try_new(items, min(share * both, left), self.old if share < 1 else self.new)
            tried, own = tried.plus(counts), own.plus(doubt)
            if share < 1:
                alone = alone.plus(self.leave_old(min((1 - share) * both, max(0.0, deadline - time.monotonic()))))
                old = shares(alone)
            self.check(worse(old, shares(tried)._replace(seconds=0.0)))  # a pause is long in a turn, not in a stage
        time.sleep(REPORTED)
        doubt = {version: count_doubt(self.service, version).minus(begun[version]) for version in begun}
        if share < 1:
            old = old._replace(doubt=doubt[self.old])
        new = shares(tried)._replace(doubt=doubt[self.new].minus(own))
        self.say(f"version {self.old}: {old}")
        self.say(f"version {self.new}: {new}")
        if share < 1 and (few := too_few(old, new)):
            self.say(f"too few to compare: {few}")
        self.check(worse(old, new))
        return old

    def check(self, fault: str) -> None:
        """Raises RolloutError when there is a fault."""
        if fault:
            raise RolloutError(f"version {self.new} {fault}")

    def try_new(self, items: Iterator[Item], seconds: float, then: str) -> tuple[Counts, Doubt]:
        """The new version is the default for ``seconds``, and ``then`` is, however long it takes to answer us.

        Returns what came until then, without our requests, and the doubt in the answers to those. The mean time is of
        what was answered before the last of them was: at the end of a short turn slow answers are still on their way.
        """
        begun, over, self.sent = count_answers(self.service), threading.Event(), 0
        self.set_default(self.new)
        with ThreadPoolExecutor(1) as asking:
            try:
                asked = asking.submit(self.ask_new, items, over)
                wait([asked], seconds)
                over.set()
                self.set_default(then)
                came, sent = count_answers(self.service).minus(begun), self.sent
                own, took = asked.result()
            except BaseException:  # the executor waits for the new version's answer; the old one is to serve meanwhile
                over.set()
                with suppress(OSError, RuntimeError, ValueError):  # whoever goes back tries again
                    self.set_default(self.old)
                raise
        ended = count_answers(self.service).minus(begun).minus(Counts(own.answers, seconds=took))
        if then == self.new:
            return ended, own
        others = came.minus(Counts(sent))
        return replace(others, seconds=ended.seconds * others.requests / max(1.0, ended.requests)), own

    def ask_new(self, items: Iterator[Item], over: threading.Event) -> tuple[Doubt, float]:
        """Ask the new version for ``items``, and whether it is ready, until it is ``over``; return the doubt in its
        answers and the seconds it took. Raises NotReady, OSError or ValueError."""
        own, took = Doubt(), 0.0
        while not over.wait(PAUSE):
            self.service = with_valid_keys(self.service, self.run)
            check_ready(self.service, self.new)
            self.sent, begun = self.sent + 1, time.perf_counter()
            (answer,) = answer_golden(self.service, [next(items)], self.new)
            took += time.perf_counter() - begun
            own = own.plus(Doubt(1, bool(answer.get("uncertain"))))
        return own, took

    def leave_old(self, seconds: float) -> Counts:
        """The old version, the default again, is left alone for ``seconds``; return what came meanwhile.

        Raises NotReady or OSError when it, or the server, is gone: whoever starts that again waits for our lock.
        """
        begun, deadline = count_answers(self.service), time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.service = with_valid_keys(self.service, self.run)
            check_ready(self.service, self.old)
            time.sleep(min(LOOK, left))
        return count_answers(self.service).minus(begun)
