"""What becomes of the requests of others while a version is rolled out: how many fail, are refused, are in doubt, and
how long they take."""

import math
from dataclasses import astuple, dataclass
from operator import add, sub
from typing import NamedTuple, Self

from src.serving.management import Service, total

MORE_FAILURES = 0.01  # a share of 5xx above the old version's by more than this is worse
MORE_REFUSALS = 0.1  # the same for 4xx, which are the clients' doing for the most part and vary by themselves
MORE_DOUBT = 0.05  # the same for answers marked as uncertain
CHANCE = 0.00135  # at most: that equal versions differ so; what three standard errors leave on one side
SLOWER, MORE_SECONDS = 2, 0.1  # a mean time of this many times the old version's, and so much above it, is worse
LEAST = 20  # requests of others; the share of 4xx among fewer, or their time, tells nothing
LEAST_ANSWERS = 200  # of each version, one an image; the same for the share of uncertain ones


class Tally:
    """Numbers that are added and subtracted field by field."""

    def plus(self, other: Self) -> Self:
        return type(self)(*map(add, astuple(self), astuple(other)))

    def minus(self, other: Self) -> Self:
        return type(self)(*map(sub, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Counts(Tally):
    """The requests for the model's predictions, the server's answers of 4xx and 5xx, and the seconds from a request's
    arrival to its answer, summed."""

    requests: float = 0
    refused: float = 0
    failed: float = 0
    seconds: float = 0


@dataclass(frozen=True)
class Doubt(Tally):
    """The answers of a version, one an image, and how many of them it marked as uncertain."""

    answers: float = 0
    uncertain: float = 0


class Shares(NamedTuple):
    """The requests of others to a version, the shares of 4xx and 5xx among them, the mean time of an answer in seconds,
    and the doubt in the answers."""

    requests: float
    refused: float
    failed: float
    seconds: float = 0.0
    doubt: Doubt = Doubt()

    def __str__(self) -> str:
        shown = f"{self.requests:.0f} requests of others, {self.failed:.2%} got 5xx, {self.refused:.2%} got 4xx"
        if self.requests >= 1:
            shown += f", {1000 * self.seconds:.0f} ms on average"
        if self.doubt.answers > 0:
            shown += f"; {self.doubt.uncertain / self.doubt.answers:.1%} of {self.doubt.answers:.0f} answers uncertain"
        return shown


def count_answers(service: Service) -> Counts:
    """The counts since the server started. Raises OSError.

    Not ``Requests2XX``: TorchServe 0.12 counts ours to management and metrics there, and every probe's. Its answers of
    4xx and 5xx name no model; those of other models make the shares larger, of both versions.
    """
    scraped = service.scrape()
    requests, microseconds = (
        total(scraped, f"ts_inference_{what}", model_name=service.model)
        for what in ("requests_total", "latency_microseconds")
    )
    return Counts(requests, total(scraped, "Requests4XX"), total(scraped, "Requests5XX"), microseconds / 1e6)


def count_doubt(service: Service, version: str) -> Doubt:
    """What the workers of ``version`` have reported since the server started; they do so a little after they answer.
    Raises OSError."""
    scraped, labels = service.scrape(), {"ModelName": service.model, "ModelVersion": version}
    return Doubt(total(scraped, "Predictions", **labels), total(scraped, "UncertainPredictions", **labels))


def shares(counts: Counts) -> Shares:
    """The shares in ``counts``, which our own requests, those that were answered, have been taken from.

    What TorchServe refuses before it knows the model is in the answers alone, so there may be more of those.
    """
    requests = max(counts.requests, counts.refused + counts.failed, 0.0)
    parts = (part / max(1.0, requests) for part in (counts.refused, counts.failed, max(0.0, counts.seconds)))
    return Shares(requests, *parts)


def worse(old: Shares, new: Shares) -> str:
    """What is worse with the new version, with the figures; empty when nothing is.

    Where little or nothing is known of the old one it is taken to have answered LEAST requests, the unknown ones
    without a 5xx: then a new one that fails everything is worse from its third request on.
    """
    failed = (old.failed * old.requests, max(LEAST, old.requests)), (new.failed * new.requests, new.requests)
    if new.failed > old.failed + MORE_FAILURES and chance(*failed) < CHANCE:
        return f"fails more often: {new.failed:.2%} of the requests got 5xx, with the old one {old.failed:.2%}"
    if new.requests >= LEAST:
        refused = (old.refused * old.requests, old.requests), (new.refused * new.requests, new.requests)
        if new.refused > old.refused + MORE_REFUSALS and chance(*refused) < CHANCE:
            return f"refuses more: {new.refused:.2%} of the requests got 4xx, with the old one {old.refused:.2%}"
        if old.requests >= LEAST and new.seconds > max(SLOWER * old.seconds, old.seconds + MORE_SECONDS):
            return f"is slower: {1000 * new.seconds:.0f} ms on average, the old one {1000 * old.seconds:.0f} ms"
    if min(old.doubt.answers, new.doubt.answers) >= LEAST_ANSWERS:
        was, now = (found.doubt.uncertain / found.doubt.answers for found in (old, new))
        doubts = ((found.doubt.uncertain, found.doubt.answers) for found in (old, new))
        if now > was + MORE_DOUBT and chance(*doubts) < CHANCE:
            return f"is in doubt more often: {now:.1%} of its answers are uncertain, of the old one's {was:.1%}"
    return ""


def chance(old: tuple[float, float], new: tuple[float, float]) -> float:
    """The chance that the new one's part, each given as ``(part, number)``, is so large or larger when both parts
    together fall on the two numbers by lot (Fisher's exact test, one-sided)."""
    (some, many), (others, number) = ((round(max(0, min(pair))), round(max(0, pair[1]))) for pair in (old, new))
    parts, all_ways = some + others, log_ways(many + number, some + others)
    tail = range(others, min(parts, number) + 1)
    return sum(math.exp(log_ways(number, k) + log_ways(many, parts - k) - all_ways) for k in tail)


def log_ways(number: int, part: int) -> float:
    """The logarithm of the ways to choose ``part`` of ``number``: of many requests they are too large a number."""
    return math.lgamma(number + 1) - math.lgamma(part + 1) - math.lgamma(number - part + 1)


def too_few(old: Shares, new: Shares) -> str:
    """What ``worse`` could not compare, for want of requests; empty when it could compare all."""
    left = [f"4xx and time (under {LEAST} requests)"] if min(old.requests, new.requests) < LEAST else []
    if min(old.doubt.answers, new.doubt.answers) < LEAST_ANSWERS:
        left.append(f"uncertain answers (under {LEAST_ANSWERS})")
    return ", ".join(left)
