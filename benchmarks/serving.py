"""Compare servers on one machine, with one model and one load: ``python benchmarks/serving.py``.

Each round starts every server in turn, waits for its first correct answer, warms it up, measures it with wrk and stops
it, so that what drifts on the machine meets all alike. Prints the table and writes docs/benchmarks.md. Needs an idle
machine: the figures of a busy one mean nothing.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.contenders import NAMES, launch, version_of
from benchmarks.load import CONTENT_TYPES, measure, require_wrk, test_images
from benchmarks.machine import describe_machine
from benchmarks.pages import table, write_page
from benchmarks.servers import ONE_THREAD, ServerError, running, stop_servers_on_sigterm
from benchmarks.targets import COLUMNS as TARGET_COLUMNS
from benchmarks.targets import targets
from benchmarks.torchserve import PYTHON, build_archive
from src.inference import Predictor

PAGE = ROOT / "docs" / "benchmarks.md"
LATENCIES = {"p50 ms": "p50_ms", "p95 ms": "p95_ms", "p99 ms": "p99_ms", "p50 ms at 1": "p50_at_1"}
COLUMNS = ("server", "requests/s", "ratio", *LATENCIES, "errors", "memory MB", "cold start s", "body")


def compare(names: list[str], arguments: argparse.Namespace, images: list[bytes], settings: dict) -> tuple[dict, dict]:
    """All rounds: by name, a list of figures; and why, for those that could not be measured."""
    expected = Predictor.load(ROOT / "models" / "best_model").predict(images[:1])[0].predicted_class
    runtime = settings["handler"]["runtime"]
    found, failed = defaultdict(list), {}
    for number in range(arguments.rounds):
        for name in names:
            if name in failed:
                continue
            try:
                with tempfile.TemporaryDirectory() as folder:
                    start = launch(name, Path(folder), arguments.workers, runtime)
                    figures = measure_one(start, arguments, images, expected)
            except ServerError as error:
                failed[name] = str(error)
                print(f"{name}: {error}", file=sys.stderr)
                continue
            found[name].append(figures)
            print(f"round {number + 1}, {name}: {figures['requests_per_second']:.0f} requests/s", flush=True)
        if "in-process" in arguments.only:
            figures = measure_in_process(arguments, images, settings["batchSize"], runtime)
            found["in-process"].append(figures)
            print(f"round {number + 1}, in-process: {figures['requests_per_second']:.0f} images/s", flush=True)
    return found, failed


def measure_one(start, arguments: argparse.Namespace, images: list[bytes], expected: int) -> dict:
    """One server: start, warm up, measure with all connections, then with one."""
    with running(start, images[0], expected) as server:
        load = {"form": start.form, "connections": arguments.connections}
        if arguments.warmup:
            measure(start.url, images, seconds=arguments.warmup, **load)
            server.settle()
        measured, memory = measure(start.url, images, seconds=arguments.seconds, **load), server.memory() / 1e6
        server.settle()
        one = measure(start.url, images, form=start.form, connections=1, seconds=arguments.seconds / 3)
        more = {"p50_at_1": one.p50_ms, "memory": memory, "cold_start": server.cold_start, "form": start.form}
        return vars(measured) | more


def measure_in_process(arguments: argparse.Namespace, images: list[bytes], batch: int, runtime: str) -> dict:
    """Decode, inference and encode in a loop, without a server."""
    with tempfile.TemporaryDirectory() as folder:
        for number, image in enumerate(images):
            Path(folder, f"{number:04d}").write_bytes(image)
        command = [PYTHON, "-m", "benchmarks.peers.in_process", folder, str(arguments.seconds), str(arguments.workers)]
        environment = {"PYTHONPATH": str(ROOT), "PEER_RUNTIME": runtime} | ONE_THREAD
        done = subprocess.run(
            [*command, str(batch)], env=environment, capture_output=True, text=True, timeout=arguments.seconds + 300
        )
    if done.returncode != 0:
        raise SystemExit(f"error: the in-process loop failed: {done.stderr[-1000:]}")
    return json.loads(done.stdout)


def rows_of(found: dict) -> list[list[str]]:
    """One row a contender: the median of its rounds; the ratio is the median of each round's to this project's."""
    rows = []
    for name, rounds in found.items():
        middle = {key: statistics.median(each[key] for each in rounds) for key in rounds[0] if key != "form"}
        ratio = "-"
        if "project" in found:
            pairs = zip(rounds, found["project"], strict=False)
            ratio = f"{statistics.median(a['requests_per_second'] / b['requests_per_second'] for a, b in pairs):.2f}"
        row = [NAMES.get(name, "in-process limit, no server"), f"{middle['requests_per_second']:,.0f}", ratio]
        if "p50_ms" in middle:
            row += [f"{middle[key]:.1f}" for key in LATENCIES.values()]
            row += [f"{middle['errors']:.0f}", f"{middle['memory']:.0f}", f"{middle['cold_start']:.1f}"]
            row.append(CONTENT_TYPES[rounds[0]["form"]])
        rows.append(row + ["-"] * (len(COLUMNS) - len(row)))
    return rows


def write_results(tables: list[str], failed: dict, arguments: argparse.Namespace, settings: dict, source: str) -> None:
    """docs/benchmarks.md."""
    runtime = settings["handler"]["runtime"]
    lines = [
        *describe_machine(), f"- Model: models/best_model, runtime {runtime}; {arguments.workers} workers each",
        f"- Load: wrk on the same cores, 1 thread, {arguments.connections} connections, {source}, 256 in turn;",
        f"  {arguments.warmup:g} s of warm-up, {arguments.seconds:g} s measured (a third of it for one connection),",
        f"  medians of {arguments.rounds} rounds", "", *tables, "",
        "Ratio: requests/s against this project in the same round. Memory: PSS of all the server's processes after the",
        "load, 10^6 bytes. Cold start: from the start of the process to the first correct answer. The stock handler",
        "runs eager PyTorch with TorchServe's own settings; the others run this project's Predictor on its runtime.",
        "", "Versions: " + "; ".join(dict.fromkeys(version_of(name) for name in NAMES)) + ".",
    ]  # fmt: skip
    lines += [f"\nNot measured: {name}, because {reason.splitlines()[0]}" for name, reason in failed.items()]
    write_page(PAGE, "serving.py", lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = [*NAMES, "in-process"]
    parser.add_argument("--only", nargs="+", choices=choices, default=choices, metavar="NAME", help=", ".join(choices))
    parser.add_argument("--connections", type=int, default=128, help="open at once; default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="of each server; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--warmup", type=float, default=60, help="seconds, for the JVM; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=15, help="measured in each round; default: %(default)s")
    parser.add_argument("--no-page", action="store_true", help="do not write docs/benchmarks.md; --only never does")
    arguments = parser.parse_args(argv)
    for name in ("connections", "workers", "rounds", "seconds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    require_wrk()
    stop_servers_on_sigterm()
    settings = build_archive()
    images, source = test_images()
    found, failed = compare([name for name in arguments.only if name in NAMES], arguments, images, settings)
    tables = [table(COLUMNS, rows_of(found))]
    if reached := targets(found):
        tables += ["", table(TARGET_COLUMNS, reached)]
    print("\n".join(tables))
    if set(arguments.only) == set(choices) and not arguments.no_page:
        write_results(tables, failed, arguments, settings, source)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
