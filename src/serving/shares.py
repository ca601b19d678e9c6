"""What becomes of the requests of others while a version is rolled out: how many fail, are refused, are in doubt."""

from typing import NamedTuple

from src.serving.management import Service, total

MORE_FAILURES = 0.01  # a share of 5xx above the old version's by more than this is worse
MORE_REFUSALS = 0.1  # the same for 4xx, which are the clients' doing for the most part and vary by themselves
MORE_DOUBT = 0.05  # the same for answers marked as uncertain
LEAST = 20  # requests of others; the share of 4xx among fewer tells nothing
LEAST_ANSWERS = 200  # of each version; among fewer the share of uncertain ones varies by 5 points by chance


class Counts(NamedTuple):
    """The requests for the model's predictions, and the server's answers of 4xx and 5xx."""

    requests: float = 0
    refused: float = 0
    failed: float = 0

    def plus(self, other: "Counts") -> "Counts":
        return Counts(*(mine + its for mine, its in zip(self, other, strict=True)))

    def minus(self, other: "Counts") -> "Counts":
        return Counts(*(mine - its for mine, its in zip(self, other, strict=True)))


class Doubt(NamedTuple):
    """The answers of a version, one an image, and how many of them it marked as uncertain."""

    answers: float = 0
    uncertain: float = 0

    def plus(self, other: "Doubt") -> "Doubt":
        return Doubt(self.answers + other.answers, self.uncertain + other.uncertain)

    def minus(self, other: "Doubt") -> "Doubt":
        return Doubt(self.answers - other.answers, self.uncertain - other.uncertain)


class Shares(NamedTuple):
    """The requests of others to a version, the shares of 4xx and 5xx among them, and the doubt in its answers."""

    requests: float
    refused: float
    failed: float
    doubt: Doubt = Doubt()

    def __str__(self) -> str:
        shown = f"{self.requests:.0f} requests of others, {self.failed:.2%} got 5xx, {self.refused:.2%} got 4xx"
        if self.doubt.answers > 0:
            shown += f"; {self.doubt.uncertain / self.doubt.answers:.1%} of {self.doubt.answers:.0f} answers uncertain"
        return shown


def count_answers(service: Service) -> Counts:
    """The counts since the server started. Raises OSError.

    Not ``Requests2XX``: TorchServe 0.12 counts ours to management and metrics there, and every probe's. Its answers of
    4xx and 5xx name no model; those of other models make the shares larger, of both versions.
    """
    scraped = service.scrape()
    requests = total(scraped, "ts_inference_requests_total", model_name=service.model)
    return Counts(requests, total(scraped, "Requests4XX"), total(scraped, "Requests5XX"))


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
    return Shares(requests, counts.refused / max(1.0, requests), counts.failed / max(1.0, requests))


def fails_more(old: Shares, new: Shares) -> str:
    """As ``worse``, by the share of 5xx alone."""
    if new.failed > old.failed + MORE_FAILURES:
        return f"fails more often: {new.failed:.2%} of the requests got 5xx, with the old one {old.failed:.2%}"
    return ""


def worse(old: Shares, new: Shares) -> str:
    """What is worse with the new version, with the shares; empty when nothing is."""
    if failing := fails_more(old, new):
        return failing
    if new.requests >= LEAST and new.refused > old.refused + MORE_REFUSALS:
        return f"refuses more: {new.refused:.2%} of the requests got 4xx, with the old one {old.refused:.2%}"
    if min(old.doubt.answers, new.doubt.answers) >= LEAST_ANSWERS:
        was, now = (found.doubt.uncertain / found.doubt.answers for found in (old, new))
        if now > was + MORE_DOUBT:
            return f"is in doubt more often: {now:.1%} of its answers are uncertain, of the old one's {was:.1%}"
    return ""
