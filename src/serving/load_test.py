"""Does a running server keep what its users were promised? ``python -m src.serving.load_test``

Sends test images in the three input forms and 2% bad requests at a constant rate, prints a table, writes a JSON file
and an HTML report, and exits 0 when every promise is kept, 1 when one is missed, 2 when it could not begin, 3 when the
others are kept and one could not be measured.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from src.serving.load_report import write_report
from src.serving.load_requests import load_images, mix
from src.serving.load_users import TIMEOUT, Answer, Usage, run_users
from src.serving.management import NotReady, Service, check_ready
from src.serving.processes import server_process
from src.serving.tls import client_context
from src.serving.tokens import add_token

BAD_SHARE = 0.02
LIMITS = {"mean_ms": 200.0, "p95_ms": 300.0, "failures": 0.01, "cpu": 0.70, "memory_mb": 2000.0}
RATE_KEPT = 0.95  # a load that was not sent proves nothing
WORDS = {True: "ok", False: "MISSED", None: "not measured"}


@dataclass(frozen=True)
class Verdict:
    """One promise: what was found, the limit, and whether it was kept; None where it could not be measured."""

    name: str
    found: float | None
    limit: float
    kept: bool | None
    note: str = ""


def summarize(answers: list[Answer], usage: Usage, duration: float) -> dict:
    """The figures of one test; latencies in milliseconds, cpu as a share of the machine, memory in 10^6 bytes."""
    latencies = 1000 * np.array([answer.seconds for answer in answers] or [TIMEOUT])
    hits = [answer.hit for answer in answers if answer.hit is not None]
    p50, p95, p99 = np.percentile(latencies, (50, 95, 99))
    return {
        "requests": len(answers),
        "requests_per_second": len(answers) / duration,
        "mean_ms": float(latencies.mean()),
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "p99_ms": float(p99),
        "max_ms": float(latencies.max()),
        "failures": sum(bool(answer.fault) for answer in answers) / len(answers) if answers else 1.0,
        "faults": dict(Counter(answer.fault for answer in answers if answer.fault)),
        "forms": dict(Counter(answer.form for answer in answers)),
        "accuracy": float(np.mean(hits)) if hits else None,
        "cpu": float(np.mean(usage.cpu)) if usage.cpu else None,
        "memory_mb": max(usage.bytes) / 1e6 if usage.bytes else None,
    }


def judge(figures: dict, rate: float) -> list[Verdict]:
    """The figures of ``summarize`` against LIMITS."""
    verdicts = []
    for name, limit in LIMITS.items():
        found = figures[name]
        if found is None:
            verdicts.append(Verdict(name, None, limit, None, "the server's processes are not to be seen from here"))
        else:
            verdicts.append(Verdict(name, found, limit, found <= limit))
    found, least = figures["requests_per_second"], RATE_KEPT * rate
    verdicts.append(Verdict("requests_per_second", found, least, found >= least, "at least"))
    return verdicts


def show(figures: dict, verdicts: list[Verdict]) -> str:
    """The table that is printed."""
    lines = [f"{'':22}{'found':>12}{'limit':>12}"]
    for verdict in verdicts:
        found = "-" if verdict.found is None else f"{verdict.found:.3f}"
        word = WORDS[verdict.kept]
        lines.append(f"{verdict.name:22}{found:>12}{verdict.limit:>12.3f}  {word}  {verdict.note}".rstrip())
    for name in ("p50_ms", "p99_ms", "max_ms", "requests", "accuracy"):
        if figures[name] is not None:
            lines.append(f"{name:22}{figures[name]:>12.3f}")
    lines += [f"{count} times: {fault}" for fault, count in figures["faults"].items()]
    return "\n".join(lines)


def conclude(verdicts: list[Verdict]) -> tuple[str, int]:
    """The last line that is printed, and the exit status."""
    if any(verdict.kept is False for verdict in verdicts):
        return "a promise was missed", 1
    if unknown := [verdict.name for verdict in verdicts if verdict.kept is None]:
        return f"not measured: {', '.join(unknown)}; the other promises are kept", 3
    return "every promise kept", 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m src.serving.load_test", description=__doc__.splitlines()[0])
    parser.add_argument("--inference", default="http://127.0.0.1:8080", help="default: %(default)s")
    parser.add_argument("--management", default="http://127.0.0.1:8081", help="default: %(default)s")
    parser.add_argument("--model", default="fashion_mnist", help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=100, help="requests a second; default: %(default)s")
    parser.add_argument("--duration", type=float, default=60, help="seconds; default: %(default)s")
    parser.add_argument("--data", type=Path, help="test images; default: data/MODEL/test.npz")
    parser.add_argument("--output", type=Path, default=Path("logs/load_test"), help="a folder; default: %(default)s")
    for api in ("management", "inference"):
        add_token(parser, api)
    arguments = parser.parse_args(argv)
    for name in ("rate", "duration"):
        if not 0 < getattr(arguments, name) < math.inf:
            parser.error(f"--{name} is {getattr(arguments, name):g}; it must be above 0 and finite")
    return arguments


def find_images(model: str, data: Path | None) -> tuple[np.ndarray, np.ndarray, str]:
    """``load_images`` of ``data``, or of the model's own test split. The mirror's images are those of one model."""
    mirror = os.environ.get("DATA_MIRROR") if model == Service().model else None
    return load_images(data or Path("data", model, "test.npz"), Path(mirror) if mirror else None)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        server = Service(arguments.model, management=arguments.management, management_token=arguments.management_token)
        workers = check_ready(server)
        ready = {worker["pid"] for worker in server.describe()["workers"] if worker["status"] == "READY"}
        process = server_process(arguments.inference, ready)
        images, labels, source = find_images(arguments.model, arguments.data)
        client_context()  # a certificate that cannot be read is told now
        arguments.output.mkdir(parents=True, exist_ok=True)
    except NotReady as error:
        print(f"error: {error}; start a server with ./run_torchserve.sh", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.rate:g} requests/s for {arguments.duration:g} s to {workers} workers: {source}")
    answers, usage = run_users(
        f"{arguments.inference}/predictions/{arguments.model}",
        mix(images, labels, BAD_SHARE),
        arguments.rate,
        arguments.duration,
        arguments.inference_token,
        process,
    )
    figures = summarize(answers, usage, arguments.duration)
    verdicts = judge(figures, arguments.rate)
    print(show(figures, verdicts))
    about = {
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB",
        "rate": arguments.rate,
        "duration_s": arguments.duration,
        "workers": workers,
        "images": source,
    }
    content = {"about": about, "figures": figures, "verdicts": [asdict(verdict) for verdict in verdicts]}
    (arguments.output / "load_test.json").write_text(json.dumps(content, indent=2) + "\n")
    write_report(arguments.output / "load_test.html", about, show(figures, verdicts), answers, usage)
    line, exit_status = conclude(verdicts)
    print(f"{line}; see {arguments.output}/load_test.html")
    return exit_status


if __name__ == "__main__":
    sys.exit(main())
