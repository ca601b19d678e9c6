"""Operate a running TorchServe; ``python -m src.serving.operate --help`` names the commands.

Runs on the serving environment; only ``deploy`` and ``rollback`` need more of it than the standard library.
"""

import argparse
import json
import math
import os
import signal
import sys
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

from src.serving.autoscaling import Rule, autoscale
from src.serving.client import send
from src.serving.draining import drain
from src.serving.golden import DEFAULT_GOLDEN, load_golden
from src.serving.lock import locked, run_folder
from src.serving.management import Service, show_status, status, wait_ready
from src.serving.scaling import scale
from src.serving.tokens import add_token
from src.serving.watching import Watch, turn

STORE = Path("torchserve/model-store")


def seconds(text: str) -> float:
    """The value of an option that says how long to wait."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no time to wait; give a number of seconds, 0 or more")
    return value


def above_zero(text: str) -> float:
    """The value of an option that something is divided by, or that keeps a loop from running without pause."""
    value = seconds(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def stages(text: str) -> tuple[float, ...]:
    """The shares of a canary from percentages, such as 5,25; after them comes all of the time."""
    shares = [float(part) / 100 for part in text.split(",")]
    if not all(0 < low < high for low, high in pairwise([*shares, 1.0])):
        raise argparse.ArgumentTypeError(f"{text} is no canary; give rising percentages below 100: 5,25")
    return (*shares, 1.0)


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    ready = commands.add_parser("ready", help="exit 0 when at least minWorkers workers are READY")
    ready.add_argument("--timeout", type=seconds, default=0, help="seconds to wait; 0 asks once")
    ready.add_argument("--process", type=int, help="give up when this PID has ended")
    shown = commands.add_parser("status", help="versions, workers, queue; exit 1 when the default cannot answer")
    shown.add_argument("--json", action="store_true", help="print JSON")
    scaling = commands.add_parser("scale", help="set the number of workers without losing a request")
    scaling.add_argument("--workers", type=int, required=True)
    autoscaling = add_autoscale(commands)
    deploying = commands.add_parser("deploy", help="roll a new version out; go back by itself when it is worse")
    deploying.add_argument("archive", type=Path, help="NEW.mar, its NEW.mar.sha256 beside it")
    deploying.add_argument("--golden", type=Path, default=DEFAULT_GOLDEN, help="images and labels.csv: %(default)s")
    deploying.add_argument("--watch", type=seconds, default=10, help="seconds to watch each stage: %(default)s")
    deploying.add_argument(
        "--canary",
        type=stages,
        default=(1.0,),
        metavar="PERCENT,...",
        help="the shares of the time that the new version serves before it serves all of it, such as 5,25",
    )
    back = commands.add_parser("rollback", help="serve the version before the last deployed one again")
    draining = commands.add_parser("drain", help="refuse new requests, answer those taken; before a server stops")
    draining.add_argument("--timeout", type=seconds, default=60, help="seconds to wait: %(default)s")
    draining.add_argument("--lock-held", action="store_true", help="the caller has the lock, as ./run_torchserve.sh")
    sending = commands.add_parser("send", help="send a JSON request, once more if it fails, and print the answer")
    sending.add_argument("file", type=Path)
    for command in (scaling, autoscaling, deploying, back, draining):
        command.add_argument("--store", type=Path, default=STORE, help="the server's model store: %(default)s")
    fields = Service()
    for command in commands.choices.values():
        command.add_argument("--model", default=fields.model, help="default: %(default)s")
        for api in ("inference", "management", "metrics"):
            command.add_argument(f"--{api}", default=getattr(fields, api), help="default: %(default)s")
        for api in ("management", "inference"):
            add_token(command, api)
    return parser


def add_autoscale(commands) -> argparse.ArgumentParser:
    """The command that scales by the load."""
    parser = commands.add_parser("autoscale", help="set the number of workers by the load, until it is ended")
    parser.add_argument("--min", type=int, default=1, help="workers at least: %(default)s")
    parser.add_argument("--max", type=int, default=os.cpu_count(), help="at most; this machine's cores: %(default)s")
    parser.add_argument("--target-ms", type=above_zero, default=20, help="mean wait for a worker: %(default)s")
    parser.add_argument("--quiet", type=seconds, default=60, help="seconds before there are fewer: %(default)s")
    parser.add_argument("--interval", type=above_zero, default=5, help="seconds between two looks: %(default)s")
    return parser


def run(arguments: argparse.Namespace, service: Service) -> int:
    """Do what the command says; return the exit status. Raises RuntimeError, ValueError or OSError with the reason."""
    match arguments.command:
        case "ready":
            count = wait_ready(service, arguments.timeout, process=arguments.process)
            print(f"{service.model} is ready: {show_count(count)}")
        case "status":
            found = status(service)
            print(json.dumps(found, indent=2) if arguments.json else show_status(found))
            return 0 if found["ready"] else 1
        case "scale":
            with locked(run_folder(arguments.store)):
                print(f"{service.model} has {show_count(scale(service, arguments.workers))}")
        case "autoscale":
            rule = Rule(arguments.min, arguments.max, arguments.target_ms, arguments.quiet)
            autoscale(service, run_folder(arguments.store), rule, arguments.interval, say)
        case "deploy" | "rollback":
            # They read archives, which needs torch and PyYAML.
            from src.serving.rollout import deploy, roll_back
            from src.serving.store import Store

            store = Store(arguments.store, service.model)
            end_by_exception()
            with locked(store.run):
                if arguments.command == "deploy":
                    items = load_golden(arguments.golden)
                    watch = Watch(arguments.watch, arguments.canary)
                    version = deploy(service, arguments.archive, store, items, watch, say)
                else:
                    version = roll_back(service, store, say)
            say(f"{service.model} {version} serves")
        case "drain":
            with nullcontext() if arguments.lock_held else locked(run_folder(arguments.store)):
                return 0 if drain(service, arguments.store, arguments.timeout, say) else 1
        case "send":
            url = f"{service.inference}/predictions/{service.model}"
            print(send(url, arguments.file.read_bytes(), token=service.inference_token).decode())
    return 0


def show_count(workers: int) -> str:
    """``1 worker``, ``2 workers``."""
    return f"{workers} worker{'s' if workers > 1 else ''}"


def say(line: str) -> None:
    """Print a step at once, also into a pipe; when nobody reads any more the work goes on."""
    try:
        print(line, flush=True)
    except OSError:  # what could not be written would be tried again at the end, and make another exit status
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end_by_exception() -> None:
    """Make the first signal that ends a command raise SystemExit, so that what was begun is taken back undisturbed."""
    signals = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN  # as nohup has it
    ]

    def end(number: int, _frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(f"error: ended by {signal.Signals(number).name}")

    for number in signals:
        signal.signal(number, end)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "scale" and arguments.workers < 1:
        parser.error(f"--workers is {arguments.workers}; it must be at least 1")
    if arguments.command == "deploy" and len(arguments.canary) > 1:
        least = math.ceil(max(map(turn, arguments.canary)))
        if arguments.watch < least:
            parser.error(
                f"--watch is {arguments.watch:g}; with this --canary both have had a turn after {least}: give that"
            )
    if arguments.command == "autoscale" and not 1 <= arguments.min <= arguments.max:
        parser.error(f"--min is {arguments.min} and --max {arguments.max}; give 1 <= --min <= --max")
    service = Service(
        arguments.model,
        arguments.inference,
        arguments.management,
        arguments.metrics,
        arguments.management_token,
        arguments.inference_token,
    )
    try:
        return run(arguments, service)
    except (RuntimeError, ValueError, OSError) as error:  # NotReady, RolloutError and ArchiveError are among them
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # deploy and rollback say that they were ended
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
