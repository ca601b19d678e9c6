"""Start a server, wait for its first correct answer, measure it, stop it with all that it started."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.load import CONTENT_TYPES, wrap
from src.serving.processes import family, memory

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT = 300.0  # seconds until the first correct answer
STOP_TIMEOUT = 20.0
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


class ServerError(RuntimeError):
    """A server that does not start or does not answer; the message ends with its log."""


@dataclass(frozen=True)
class Launch:
    """How a server is started. ``form``: the body it takes (benchmarks/load.py). ``launcher``: the first process only
    waits, and where it is deployed there is none, so its memory does not count."""

    command: list[str]
    url: str
    form: str = "raw"
    environment: dict[str, str] = field(default_factory=dict)
    launcher: bool = False
    cwd: Path | None = None  # None: an empty folder


@dataclass
class Server:
    """A server that answers."""

    launch: Launch
    process: psutil.Process
    cold_start: float  # seconds from the start of its process to the first correct answer
    settle: Callable[[], None]  # waits for a right answer: those that a load left in the queue are done then

    def memory(self) -> int:
        """PSS of all its processes, bytes."""
        return memory(family(self.process)[1 if self.launch.launcher else 0 :])


def stop_servers_on_sigterm() -> None:
    """Let a benchmark that is ended stop what it started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def running(launch: Launch, image: bytes, expected: int) -> Iterator[Server]:
    """The server while the block runs. It must answer ``image`` with class ``expected``. Raises ServerError."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        ours = {"PYTHONPATH", *ONE_THREAD}  # what is of this process and no setting of the server
        environment = {key: value for key, value in os.environ.items() if key not in ours} | launch.environment
        with log.open("wb") as output:
            begin = time.perf_counter()
            process = subprocess.Popen(
                launch.command,
                cwd=launch.cwd or folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # as a server has: Linux shares the cores among sessions, so wrk has its own
            )
        root = psutil.Process(process.pid)
        settle = functools.partial(wait_for_answer, launch, process, image, expected, log)
        try:
            settle()
            yield Server(launch, root, time.perf_counter() - begin, settle)
        finally:
            stop(root)
            process.wait(STOP_TIMEOUT)


def wait_for_answer(launch: Launch, process: subprocess.Popen, image: bytes, expected: int, log: Path) -> None:
    """Ask every 20 ms until the answer is right. Raises ServerError."""
    deadline, last = time.monotonic() + START_TIMEOUT, "nothing listens"
    body = wrap(image, launch.form)
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"it ended with {process.returncode}:\n{log.read_text(errors='replace')[-2000:]}")
        request = urllib.request.Request(launch.url, body, {"Content-Type": CONTENT_TYPES[launch.form]})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                found = find_class(json.loads(answer.read()))
            if found == expected:
                return
            raise ServerError(f"the first image is of class {expected}, the answer was {found}")
        except urllib.error.HTTPError as error:
            last = f"{error.code} {error.read()[:300]!r}"
        except OSError as error:
            last = str(error)
        time.sleep(0.02)
    tail = log.read_text(errors="replace")[-2000:]
    raise ServerError(f"no correct answer in {START_TIMEOUT:.0f} s, the last was: {last}\n{tail}")


def find_class(answer: object) -> int | None:
    """The predicted class in an answer, which some servers wrap into lists or under ``predictions``."""
    while isinstance(answer, list) or (isinstance(answer, dict) and "predictions" in answer):
        answer = answer[0] if isinstance(answer, list) and answer else answer["predictions"] if answer else None
    return answer.get("predicted_class") if isinstance(answer, dict) else None


def stop(root: psutil.Process) -> None:
    """End ``root`` and all that descends from it."""
    processes = family(root)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, STOP_TIMEOUT)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
