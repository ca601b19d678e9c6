"""What becomes of the requests of others while a version is rolled out: how many fail, how many are refused."""

from typing import NamedTuple

from src.serving.management import Service, total

MORE_FAILURES = 0.01  # a share of 5xx above the one before by more than this is worse
MORE_REFUSALS = 0.1  # the same for 4xx, which are the clients' doing for the most part and vary by themselves
LEAST = 20  # requests of others; the share of 4xx among fewer tells nothing


class Counts(NamedTuple):
    """Since the server started: the requests for the model's predictions, and the server's answers of 4xx and 5xx."""

    requests: float
    refused: float
    failed: float


class Shares(NamedTuple):
    """Between two counts: the requests of others, and the shares of 4xx and 5xx among them."""

    requests: float
    refused: float
    failed: float


def count_answers(service: Service) -> Counts:
    """The counts of now. Raises OSError.

    Not ``Requests2XX``: TorchServe 0.12 counts ours to management and metrics there, and every probe's. Its answers of
    4xx and 5xx name no model; those of other models make the shares larger, before and after.
    """
    scraped = service.scrape()
    requests = total(scraped, "ts_inference_requests_total", model_name=service.model)
    return Counts(requests, total(scraped, "Requests4XX"), total(scraped, "Requests5XX"))


def shares(begun: Counts, ended: Counts, own: int) -> Shares:
    """The shares between two counts, without the ``own`` requests for predictions that we sent and that were answered.

    What TorchServe refuses before it knows the model is in the answers alone, so there may be more of those.
    """
    refused, failed = ended.refused - begun.refused, ended.failed - begun.failed
    requests = max(ended.requests - begun.requests - own, refused + failed, 0.0)
    return Shares(requests, refused / max(1.0, requests), failed / max(1.0, requests))


def worse(before: Shares, after: Shares) -> str:
    """What got worse, with the shares; empty when nothing did."""
    if after.failed > before.failed + MORE_FAILURES:
        return f"fails more often: {after.failed:.2%} of the requests got 5xx, before {before.failed:.2%}"
    if after.requests >= LEAST and after.refused > before.refused + MORE_REFUSALS:
        return f"refuses more: {after.refused:.2%} of the requests got 4xx, before {before.refused:.2%}"
    return ""
