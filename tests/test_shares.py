"""src/serving/shares.py: what is worse in the traffic of others, reckoned without a server."""

import random

import pytest

from src.serving.management import Service
from src.serving.shares import Counts, Doubt, Shares, chance, count_answers, count_doubt, shares, too_few, worse
from tests.file_server import serve

CALM = Shares(1000, 0.02, 0.001, 0.03, Doubt(1000, 50))
METRICS = b"""# TYPE ts_inference_requests_total counter
ts_inference_latency_microseconds{model_name="clothing_small",model_version="1.0",hostname="a",} 1500000.0
ts_inference_requests_total{model_name="clothing",model_version="1.0",hostname="a",} 9000.0
ts_inference_requests_total{model_name="clothing_small",model_version="1.0",hostname="a",} 30.0
ts_inference_requests_total{model_name="clothing_small",model_version="2.0",hostname="a",} 12.0
Requests4XX{Level="Host",Hostname="a",} 5.0
Predictions{Class="Bag",ModelVersion="1.0",ModelName="clothing",Level="Model",Hostname="a",} 70.0
Predictions{Class="Coat",ModelVersion="1.0",ModelName="clothing",Level="Model",Hostname="a",} 30.0
Predictions{Class="Coat",ModelVersion="2.0",ModelName="clothing",Level="Model",Hostname="a",} 4.0
UncertainPredictions{Class="Coat",ModelVersion="1.0",ModelName="clothing",Level="Model",Hostname="a",} 9.0
Requests5XX{Level="Host",Hostname="a",} 3.0
"""


def test_the_requests_are_those_of_the_model_alone():
    """Those of a busy neighbour would hide the failures of a model that few ask."""
    with serve({"metrics": METRICS}) as server:
        counts = [count_answers(Service(name, metrics=server.url)) for name in ("clothing", "clothing_small", "other")]
    assert counts == [Counts(9000, 5, 3), Counts(42, 5, 3, 1.5), Counts(0, 5, 3)]


def test_the_doubt_is_that_of_a_version():
    with serve({"metrics": METRICS}) as server:
        found = [count_doubt(Service("clothing", metrics=server.url), version) for version in ("1.0", "2.0", "3.0")]
    assert found == [Doubt(100, 9), Doubt(4, 0), Doubt()]


def test_our_own_requests_do_not_dilute_the_shares():
    """Of 100 requests of others 5 fail and 10 are refused; 400 were our golden set's."""
    begun, ended, own = Counts(1000, 50, 7), Counts(1500, 60, 12), Counts(400)
    assert shares(ended.minus(begun).minus(own)) == Shares(100, 0.1, 0.05)


@pytest.mark.parametrize(
    ("ended", "found"),
    [
        (Counts(40, 0, 0), (0, 0, 0)),  # nobody but us
        (Counts(40, 0, 6), (6, 0, 1)),  # refused before the model was known
        (Counts(0, 0, 0), (0, 0, 0)),  # started again, so the counts began again
    ],
)
def test_shares_of_few_requests(ended, found):
    assert shares(ended.minus(Counts(40))) == Shares(*found)


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (Shares(1000, 0.02, 0.001), ""),
        (Shares(1000, 0.02, 0.011), ""),
        (Shares(1000, 0.02, 0.013), "fails more often: 1.30% of the requests got 5xx, with the old one 0.10%"),
        (Shares(3, 0.0, 2 / 3), "fails more often: 66.67% of the requests got 5xx, with the old one 0.10%"),
        (Shares(1000, 0.11, 0.0), ""),
        (Shares(1000, 0.13, 0.0), "refuses more: 13.00% of the requests got 4xx, with the old one 2.00%"),
        (Shares(19, 1.0, 0.0), ""),
        (CALM._replace(seconds=0.13), ""),
        (CALM._replace(seconds=0.14), "is slower: 140 ms on average, the old one 30 ms"),
        (CALM._replace(requests=19, seconds=9.0), ""),
        (CALM._replace(doubt=Doubt(1000, 100)), ""),
        (
            CALM._replace(doubt=Doubt(1000, 110)),
            "is in doubt more often: 11.0% of its answers are uncertain, of the old one's 5.0%",
        ),
        (CALM._replace(doubt=Doubt(199, 199)), ""),
    ],
)
def test_what_is_worse(after, said):
    assert worse(CALM, after) == said


def test_what_may_be_by_chance_is_not_worse():
    few, doubtful = Shares(20, 0.05, 0.0), CALM._replace(doubt=Doubt(200, 88))
    assert worse(CALM, Shares(3, 0.0, 1 / 3)) == ""
    assert worse(few, Shares(20, 0.5, 0.0)) == ""
    assert worse(few, Shares(20, 0.55, 0.0)).startswith("refuses more: 55.00%")
    assert worse(few._replace(requests=1000), Shares(20, 0.25, 0.0)) == ""
    assert worse(few._replace(requests=1000), Shares(20, 0.3, 0.0)).startswith("refuses more: 30.00%")
    assert worse(doubtful, CALM._replace(doubt=Doubt(200, 108))) == ""
    assert worse(doubtful, CALM._replace(doubt=Doubt(2000, 1080))) == ""
    assert worse(doubtful, CALM._replace(doubt=Doubt(200, 120))).startswith("is in doubt more often: 60.0%")


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ((3, 10), (7, 10), 0.0894477),
        ((0, 95), (1, 5), 0.05),
        ((1, 1000), (2, 3), 1.78984e-5),
        ((20_000, 1_000_000), (1_150, 50_000), 2.65701e-6),
        ((0, 0), (5, 5), 1),
    ],
)
def test_the_chance_is_that_of_fishers_exact_test(old, new, found):
    """As scipy.stats.hypergeom has it."""
    assert chance(old, new) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("known", [0, 3, 20, 190])
def test_a_version_that_fails_everything_is_known_within_three_requests(known):
    assert worse(Shares(known, 0.0, 0.0), Shares(1, 0.0, 1.0)) == ""
    assert worse(Shares(known, 0.0, 0.0), Shares(3, 0.0, 1.0)).startswith("fails more often: 100.00%")
    assert worse(Shares(known, 0.0, 1.0), Shares(9, 0.0, 1.0)) == "" or not known


def test_equal_versions_seldom_differ():
    """A canary at 5% for five minutes, then at 25%, looked at after each turn; 10 requests a second, 5xx among them."""
    numbers, back = random.Random(0), 0

    def answered(seconds: float, share: float) -> Counts:
        requests = round(10 * seconds)
        return Counts(requests, 0, sum(numbers.random() < share for _ in range(requests)))

    for background in (0.001, 0.01):
        for part, turn in ((0.05, 10), (0.25, 5)):
            for _ in range(50):
                old, new = Counts(), Counts()
                for _ in range(300 // turn):
                    new = new.plus(answered(part * turn, background))
                    old = old.plus(answered((1 - part) * turn, background))
                    if worse(shares(old), shares(new)):
                        back += 1
                        break
    assert back <= 4  # of 200; 59 when a share above the limit was enough


def test_a_mean_time_that_is_long_already_must_double():
    slow = CALM._replace(seconds=0.5)
    assert worse(slow, CALM._replace(seconds=0.99)) == ""
    assert worse(slow, CALM._replace(seconds=1.01)).startswith("is slower: 1010 ms")


@pytest.mark.parametrize(
    ("new", "left"),
    [
        (CALM, ""),
        (CALM._replace(requests=19), "4xx and time (under 20 requests)"),
        (CALM._replace(doubt=Doubt(199, 0)), "uncertain answers (under 200)"),
    ],
)
def test_what_few_requests_cannot_tell(new, left):
    assert too_few(CALM, new) == too_few(new, CALM) == left
