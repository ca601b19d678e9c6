"""Many requests against a server of its own, with a verdict: ``python benchmarks/soak.py --requests 1000000``.

Passes when every good request is answered rightly, every bad one with 400, the workers are those of the beginning, and
the memory (PSS of Java and its workers) of the last quarter is not above that of the second by more than GROWTH.
"""

import argparse
import base64
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import orjson
import psutil
import requests
from tqdm import tqdm

from benchmarks.torchserve import require_no_server
from src.serving.management import Service
from src.serving.ports import free_ports
from src.serving.processes import family, memory
from src.serving.scaling import scale

GROWTH = 0.05
CLIENTS = 16
BAD_EVERY = 50  # requests; 2% are no image
SAMPLES = 200  # measurements of the memory
TIMEOUT = 30  # seconds


def start(workers: int) -> Service:
    """A server of this checkout on free ports, as ./run_torchserve.sh starts it."""
    ports = free_ports(3)
    run_script("--native", "--ports", ",".join(map(str, ports)))
    service = Service("fashion_mnist", *(f"http://127.0.0.1:{port}" for port in ports))
    if workers > 1:
        scale(service, workers)
    return service


def run_script(*arguments: str) -> None:
    """Run ./run_torchserve.sh; exit when it fails."""
    if subprocess.run(["./run_torchserve.sh", *arguments], cwd=ROOT).returncode != 0:
        raise SystemExit("error: ./run_torchserve.sh failed; its message is above")


def pids(service: Service) -> list[int]:
    """The worker processes."""
    return sorted(worker["pid"] for worker in service.describe()["workers"])


def load(service: Service, total: int, java: psutil.Process) -> tuple[Counter, list[float]]:
    """Send ``total`` requests; what they came to, and the memory over time."""
    path = f"/predictions/{service.model}"
    text = (ROOT / "torchserve" / "sample_input.json").read_bytes()
    image = base64.b64decode(orjson.loads(text)["image"])
    wanted = requests.post(f"{service.inference}{path}", data=image, timeout=TIMEOUT).json()["probabilities"]
    seen: Counter = Counter()
    sizes: list[float] = []
    lock = threading.Lock()
    progress = tqdm(total=total, unit=" requests", smoothing=0.01)

    def outcome_of(connection: HTTPConnection, body: bytes, bad: bool) -> int | str:
        connection.request("POST", path, body)
        response = connection.getresponse()
        content = response.read()
        if response.status == 200:
            found = orjson.loads(content)["probabilities"]
            right = all(abs(found[name] - value) < 1e-5 for name, value in wanted.items())
            return "right" if right and not bad else "wrong"
        return "refused rightly" if response.status == 400 and bad else response.status

    def send_share(count: int) -> None:
        # Not requests: its client takes more of the cores than the server does.
        connection = HTTPConnection(service.inference.removeprefix("http://"), timeout=TIMEOUT)
        for number in range(count):
            bad = number % BAD_EVERY == BAD_EVERY - 1
            try:
                outcome = outcome_of(connection, b"no image" if bad else (image, text)[number % 2], bad)
            except (OSError, HTTPException) as error:
                outcome = type(error).__name__
                connection.close()  # the next request opens it again
            with lock:
                seen[outcome] += 1
                progress.update()
                if seen.total() % max(1, total // SAMPLES) == 0:
                    sizes.append(memory(family(java)) / 1e6)
        connection.close()

    with ThreadPoolExecutor(CLIENTS) as clients:
        for client in [clients.submit(send_share, total // CLIENTS) for _ in range(CLIENTS)]:
            client.result()
    progress.close()
    return seen, sizes


def judge(seen: Counter, sizes: list[float], restarted: bool) -> list[str]:
    """What is wrong; nothing when the run passes."""
    good = ("right", "refused rightly")
    wrong = [f"{count} requests came to {what}" for what, count in seen.items() if what not in good]
    quarter = len(sizes) // 4
    begun, ended = statistics.median(sizes[quarter : 2 * quarter]), statistics.median(sizes[-quarter:])
    print(f"PSS: {sizes[0]:.0f} MB at first, {begun:.0f} MB in the second quarter, {ended:.0f} MB in the last")
    if ended > begun * (1 + GROWTH):
        wrong.append(f"memory grew by {ended / begun - 1:.1%}, the limit is {GROWTH:.0%}")
    if restarted:
        wrong.append("a worker was restarted")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000_000, help="default: %(default)s, at least 1,000")
    parser.add_argument("--workers", type=int, default=2, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.requests < 1000:
        parser.error(f"--requests is {arguments.requests}; the memory cannot be judged below 1000")
    require_no_server()
    try:
        service = start(arguments.workers)
        before = pids(service)
        java = psutil.Process(before[0]).parent()
        begun = time.monotonic()
        seen, sizes = load(service, arguments.requests, java)
        seconds = time.monotonic() - begun
        wrong = judge(seen, sizes, pids(service) != before)
    finally:
        run_script("--stop")
    print(f"{seen.total()} requests in {seconds:.0f} s: {dict(seen)}")
    print("\n".join(f"FAILED: {sentence}" for sentence in wrong) or "PASSED")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
