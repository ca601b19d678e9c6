"""A new version before it serves for good: as a canary it has turns with the old one first, then all of the time; its
requests are watched meanwhile."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from src.serving.golden import Item, answer_golden
from src.serving.management import Service, check_ready
from src.serving.retiring import with_valid_keys
from src.serving.shares import Counts, Doubt, Shares, count_answers, count_doubt, fails_more, shares, worse

TURN = 5.0  # seconds in which a canary and the old version are the default once each
PAUSE = 0.05  # seconds between two requests of ours
REPORTED = 1.0  # seconds after which workers have told what they answered; REPORT_EVERY of src/inference/report.py


class RolloutError(RuntimeError):
    """The version was not rolled out, and the one before it serves; the message says why."""


class Watch(NamedTuple):
    """``stages``: the shares of the time for which the new version is the default, the last one 1.0; each is watched
    for ``seconds``."""

    seconds: float
    stages: tuple[float, ...] = (1.0,)


class Seen(NamedTuple):
    """What came while a version was the default, without our requests, and the doubt in the answers to ours."""

    counts: Counts = Counts()
    own: Doubt = Doubt()


@dataclass
class Trial:
    """A new version beside the old one, both READY; ``run`` and ``items``: the server's folder and the golden set."""

    service: Service
    run: Path
    items: list[Item]
    old: str
    new: str
    say: Callable

    def introduce(self, watch: Watch, before: Shares) -> None:
        """Make the new version the default, stage by stage; ``before``: of the requests before that, to the old one.

        Raises RolloutError, NotReady, OSError or ValueError when it is worse in one of them.
        """
        for share in watch.stages:
            self.set_default(self.new)
            self.say(f"version {self.new} is the default" + (f" {share:.0%} of the time" if share < 1 else ""))
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
        seen = {self.old: Seen(), self.new: Seen()}
        begun = {version: count_doubt(self.service, version) for version in seen}
        turns = {version: part for version, part in ((self.new, share), (self.old, 1 - share)) if part > 0}
        asked, deadline = cycle(self.items), time.monotonic() + seconds
        old = before
        while (left := deadline - time.monotonic()) > 0:
            for version, part in turns.items():
                turn, had = self.serve(asked, version, min(part * TURN, left)), seen[version]
                seen[version] = Seen(had.counts.plus(turn.counts), had.own.plus(turn.own))
            if self.old in turns:
                old = shares(seen[self.old].counts)
            both = seen[self.old].counts.plus(seen[self.new].counts)  # what fails late fails in the other one's turn
            self.check(worse(old, shares(seen[self.new].counts)) or fails_more(before, shares(both)))
        time.sleep(REPORTED)
        doubt = {name: count_doubt(self.service, name).minus(begun[name]).minus(seen[name].own) for name in turns}
        old = old._replace(doubt=doubt.get(self.old, before.doubt))
        new = shares(seen[self.new].counts)._replace(doubt=doubt[self.new])
        self.say(f"version {self.old}: {old}")
        self.say(f"version {self.new}: {new}")
        self.check(worse(old, new))
        return old

    def check(self, worse: str) -> None:
        """Raises RolloutError when there is something that is worse."""
        if worse:
            raise RolloutError(f"version {self.new} {worse}")

    def serve(self, items: Iterator[Item], version: str, seconds: float) -> Seen:
        """Make ``version`` the default for ``seconds``, ask it for ``items`` meanwhile, and whether it is ready."""
        begun, own, end = count_answers(self.service), Doubt(), time.monotonic() + seconds
        self.set_default(version)
        while time.monotonic() < end:
            check_ready(self.service)
            (answer,) = answer_golden(self.service, [next(items)])
            if answer["model_version"] != version:
                raise RolloutError(f"the default address is answered by version {answer['model_version']}")
            own = own.plus(Doubt(1, bool(answer.get("uncertain"))))
            time.sleep(PAUSE)
        return Seen(count_answers(self.service).minus(begun).minus(Counts(own.answers)), own)
