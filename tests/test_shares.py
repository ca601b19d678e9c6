"""src/serving/shares.py: what is worse in the traffic of others, reckoned without a server."""

import pytest

from src.serving.shares import Counts, Shares, shares, worse

CALM = Shares(1000, 0.02, 0.001)


def test_our_own_requests_do_not_dilute_the_shares():
    """Of 100 requests of others 5 fail and 10 are refused; 400 were our golden set's."""
    begun, ended = Counts(1000, 50, 7), Counts(1500, 60, 12)
    assert shares(begun, ended, own=400) == Shares(100, 0.1, 0.05)


@pytest.mark.parametrize(
    ("ended", "found"),
    [
        (Counts(40, 0, 0), (0, 0, 0)),  # nobody but us
        (Counts(40, 0, 6), (6, 0, 1)),  # refused before the model was known
        (Counts(0, 0, 0), (0, 0, 0)),  # started again, so the counts began again
    ],
)
def test_shares_of_few_requests(ended, found):
    assert shares(Counts(0, 0, 0), ended, own=40) == Shares(*found)


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (Shares(1000, 0.02, 0.001), ""),
        (Shares(1000, 0.02, 0.011), ""),
        (Shares(1000, 0.02, 0.012), "fails more often: 1.20% of the requests got 5xx, before 0.10%"),
        (Shares(3, 0.0, 1 / 3), "fails more often: 33.33% of the requests got 5xx, before 0.10%"),
        (Shares(1000, 0.11, 0.0), ""),
        (Shares(1000, 0.13, 0.0), "refuses more: 13.00% of the requests got 4xx, before 2.00%"),
        (Shares(19, 1.0, 0.0), ""),
    ],
)
def test_what_is_worse(after, said):
    assert worse(CALM, after) == said
