"""What the container runs: TorchServe in the foreground, with the arguments given appended, and drained at its end.

``torchserve --foreground`` dies on SIGTERM and leaves its Java server behind, which the container's end then kills with
all the requests in it. Here new requests are refused first and those taken are answered, for at most ``DRAIN_SECONDS``
(8, because ``docker stop`` kills after 10); then the signal goes to Java, and this process ends after it.
"""

import os
import re
import signal
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent
STORE = ROOT / "model-store"
sys.path.append(str(STORE / "fashion_mnist.mar"))  # this folder is all that the image's build sees; the archive has src

from src.serving.draining import drain
from src.serving.management import Service
from src.serving.tokens import read_token


def own_service() -> Service:
    """The server in this container, as config.properties has it, and its key. Raises RuntimeError or OSError."""
    settings = (ROOT / "config.properties").read_text()
    management, metrics = (
        re.search(rf"^{api}_address=(.*)$", settings, re.MULTILINE)[1].replace("//0.0.0.0:", "//127.0.0.1:")
        for api in ("management", "metrics")
    )
    here = Path()  # where TorchServe writes its keys, if it asks for them
    token = read_token("management", here, management=management) if (here / "key_file.json").exists() else ""
    return Service(management=management, metrics=metrics, management_token=token)


def stop(number: int, _frame: object) -> None:
    """Drain, then send the signal on to the Java server, this process's only child. A second signal does not wait."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, forward)
    try:
        drain(own_service(), STORE, float(os.environ.get("DRAIN_SECONDS", "8")), print)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"not drained: {error}", flush=True)
    forward(number, _frame)


def forward(number: int, _frame: object) -> None:
    """Send the signal on to the Java server."""
    for child in psutil.Process().children():
        child.send_signal(number)


def main() -> None:
    from ts.model_server import start

    os.environ.pop("PYTHONPATH", None)  # it would come before the archive's own modules in every worker
    os.umask(0o077)  # the keys are nobody else's
    for here in (Path("io"), Path("org")):  # where Java looks first; see java/HttpPostRequestDecoder.java
        here.unlink(missing_ok=True)
        here.symlink_to(ROOT / "java" / here)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    sys.argv = [
        "torchserve", "--start", "--foreground", "--no-config-snapshots",
        "--ts-config", f"{ROOT}/config.properties",
        "--log-config", f"{ROOT}/log4j2.xml",
        "--model-store", str(STORE),
        *sys.argv[1:],
    ]  # fmt: skip
    start()


if __name__ == "__main__":
    main()
