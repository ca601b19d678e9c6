"""What this project's server is to reach on two cores with the load generator, beside what was found."""

import statistics

COLUMNS = ("target", "wanted", "found", "met")
LIMITS = (  # title, key of a measurement, limit, whether it is a least
    ("requests/s", "requests_per_second", 5000, True),
    ("p99 ms", "p99_ms", 50, False),
    ("p50 ms at 1 connection", "p50_at_1", 3, False),
    ("cold start s", "cold_start", 4, False),
    ("memory MB", "memory", 900, False),
)
TIMES_BEST_PEER, SHARE_OF_LIMIT = 2, 0.5


def targets(found: dict[str, list[dict]]) -> list[list[str]]:
    """One row a target, from the rounds of each contender; none without this project's own."""
    own = found.get("project", [])
    if not own:
        return []
    rows = [
        row(title, statistics.median(each[key] for each in own), limit, least) for title, key, limit, least in LIMITS
    ]
    rates = {name: [each["requests_per_second"] for each in rounds] for name, rounds in found.items()}
    project, limit = rates["project"], rates.get("in-process")
    others = [values for name, values in rates.items() if name != "in-process" and not name.startswith("project")]
    if others:
        best = [max(peers) for peers in zip(*others, strict=False)]
        rows.append(row("times the best other server", compare(project, best), TIMES_BEST_PEER, True))
    if limit:
        rows.append(row("share of the in-process limit", compare(project, limit), SHARE_OF_LIMIT, True))
    return rows


def compare(rates: list[float], others: list[float]) -> float:
    """The median over the rounds of the ratio."""
    return statistics.median(one / other for one, other in zip(rates, others, strict=False))


def row(title: str, value: float, limit: float, least: bool) -> list[str]:
    """The cells of COLUMNS."""
    met = value >= limit if least else value <= limit
    shown = f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
    return [title, f"{'at least' if least else 'at most'} {limit:,}", shown, "yes" if met else "NO"]
