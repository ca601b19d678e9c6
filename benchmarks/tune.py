"""Which settings of TorchServe matter? ``python benchmarks/tune.py``

Changes one factor at a time from what ships, in rounds that each measure every setting, the shipped one at the
beginning and at the end, and compares each with those two. Prints the table and writes docs/tuning.md. Needs an idle
machine; a round takes about 8 minutes.
"""

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.load import measure, require_wrk, test_images
from benchmarks.machine import describe_machine
from benchmarks.pages import table, write_page
from benchmarks.servers import running, stop_servers_on_sigterm
from benchmarks.torchserve import PROPERTIES, Setting, build_archive, prepare
from src.inference import Predictor
from src.serving.settings import read_properties

PAGE = ROOT / "docs" / "tuning.md"
SHIPPED = ("shipped", "")
COLUMNS = ("factor", "setting", "requests/s", "ratio", "p99 ms", "p50 ms at 8", "p50 ms at 1", "memory MB", "start s")
WORKERS = (1, 2, 3)
MODEL = {"batchSize": (1, 8, 32, 64, 128)}
CONFIG = {"number_of_netty_threads": ("2",), "netty_client_threads": ("2",), "async_logging": ("true",)}
POOL = "-Djava.util.concurrent.ForkJoinPool.common.parallelism=1"  # what Java itself takes on two processors
JAVA = ("-XX:+UseG1GC", "-XX:+UseParallelGC", "-XX:TieredStopAtLevel=1", POOL)
FACTORS = ("workers", *MODEL, *CONFIG, "vmargs", "java", "logs")


def settings_of(factors: list[str], shipped: dict, workers: int) -> dict[tuple[str, str], Setting]:
    """By (factor, value): the shipped setting first, then every other value of each factor."""
    base = {"minWorkers": workers, "maxWorkers": workers}
    found, lines = {SHIPPED: Setting(base)}, read_properties(PROPERTIES.read_text(), PROPERTIES.name)
    for factor in factors:
        if factor == "workers":
            for count in WORKERS:
                if count != workers:
                    found[factor, str(count)] = Setting({"minWorkers": count, "maxWorkers": count})
        elif factor in MODEL:
            for value in MODEL[factor]:
                if value != shipped[factor]:
                    found[factor, str(value)] = Setting(base | {factor: value})
        elif factor in CONFIG:
            for value in CONFIG[factor]:
                if value != lines.get(factor):
                    found[factor, value] = Setting(base, {factor: value})
        elif factor == "vmargs":
            for option in JAVA:  # Java takes one garbage collector only; of the rest the last
                kept = [word for word in lines["vmargs"].split() if not (word.endswith("GC") and option.endswith("GC"))]
                found[factor, option] = Setting(base, {"vmargs": " ".join([*kept, option])})
        elif factor == "java":
            found[factor, "TorchServe's own"] = Setting(base, java=None)
        else:
            found[factor, "TorchServe's own"] = Setting(base, log_config=None)
    return found


def measure_setting(setting: Setting, arguments: argparse.Namespace, images: list[bytes], expected: int) -> dict:
    """Start, warm up, measure with many connections, with 8 and with 1."""
    with tempfile.TemporaryDirectory() as folder:
        launch, _ = prepare(setting, Path(folder))
        with running(launch, images[0], expected) as server:
            if arguments.warmup:
                measure(launch.url, images, connections=arguments.connections, seconds=arguments.warmup)
            load = {"url": launch.url, "images": images, "seconds": arguments.seconds}
            many = measure(connections=arguments.connections, **load)
            load["seconds"] /= 2
            some, one = measure(connections=8, **load), measure(connections=1, **load)
            return {
                "requests_per_second": many.requests_per_second,
                "p99_ms": many.p99_ms,
                "p50_at_8": some.p50_ms,
                "p50_at_1": one.p50_ms,
                "memory": server.memory() / 1e6,
                "cold_start": server.cold_start,
            }


def rows_of(found: dict) -> list[list[str]]:
    """Medians over the rounds; the ratio: of each round to the mean of its two of the shipped setting."""
    rows, rates = [], [each["requests_per_second"] for each in found[SHIPPED]]
    shipped = [statistics.mean(pair) for pair in zip(rates[::2], rates[1::2], strict=True)]
    for (factor, value), rounds in found.items():
        middle = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        bases = rates if (factor, value) == SHIPPED else shipped
        ratio = statistics.median(a["requests_per_second"] / b for a, b in zip(rounds, bases, strict=True))
        row = [factor, value, f"{middle['requests_per_second']:,.0f}", f"{ratio:.2f}"]
        row += [f"{middle[key]:.1f}" for key in ("p99_ms", "p50_at_8", "p50_at_1")]
        rows.append([*row, f"{middle['memory']:.0f}", f"{middle['cold_start']:.1f}"])
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=FACTORS, default=FACTORS, metavar="FACTOR", help=", ".join(FACTORS)
    )
    parser.add_argument("--workers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--connections", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--warmup", type=float, default=15, help="seconds; default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=4, help="measured; half of it each for 8 and 1; default: %(default)s"
    )
    parser.add_argument("--no-page", action="store_true", help="do not write docs/tuning.md; --only never does")
    arguments = parser.parse_args(argv)
    require_wrk()
    stop_servers_on_sigterm()
    shipped = build_archive()
    images, source = test_images()
    expected = Predictor.load(ROOT / "models" / "best_model").predict(images[:1])[0].predicted_class
    settings, found = settings_of(arguments.only, shipped, arguments.workers), defaultdict(list)
    for number in range(arguments.rounds):
        for name in [*settings, SHIPPED]:
            found[name].append(measure_setting(settings[name], arguments, images, expected))
            rate = found[name][-1]["requests_per_second"]
            print(f"round {number + 1}, {' '.join(name).strip()}: {rate:.0f} requests/s", flush=True)
    options = read_properties(PROPERTIES.read_text(), PROPERTIES.name)["vmargs"]
    rates = [each["requests_per_second"] for each in found[SHIPPED]]
    spread = 100 * (max(rates) - min(rates)) / statistics.median(rates)
    lines = [
        *describe_machine(),
        f"- Load: wrk, {arguments.connections} connections, {source}; {arguments.warmup:g} s of warm-up, "
        f"{arguments.seconds:g} s measured, {arguments.rounds} round{'s' * (arguments.rounds > 1)}",
        f"- Shipped, scaled to {arguments.workers} workers: batchSize {shipped['batchSize']}, `{options}`, "
        f"torchserve/java (without it maxBatchDelay {shipped['maxBatchDelay']} ms), torchserve/log4j2.xml",
        f"- The shipped setting's own {len(rates)} measurements differ by {spread:.0f}%: "
        "a smaller difference means nothing",
        "",
        table(COLUMNS, rows_of(found)),
    ]
    print("\n".join(lines))
    if set(arguments.only) == set(FACTORS) and not arguments.no_page:
        write_page(PAGE, "tune.py", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
