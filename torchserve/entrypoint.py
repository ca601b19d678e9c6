"""What the container runs: TorchServe in the foreground, with the arguments given appended.

``torchserve --foreground`` dies on SIGTERM and leaves its Java server behind, which the container's end then kills.
Here the signal goes to Java, which shuts down, and this process ends after it.
"""

import os
import signal
import sys

import psutil
from ts.model_server import start

ROOT = "/opt/model-server"


def forward(number: int, _frame: object) -> None:
    """Send the signal on to the Java server, this process's only child."""
    for child in psutil.Process().children():
        child.send_signal(number)


def main() -> None:
    os.environ.pop("PYTHONPATH", None)  # it would come before the archive's own modules in every worker
    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    sys.argv = [
        "torchserve", "--start", "--foreground", "--no-config-snapshots",
        "--ts-config", f"{ROOT}/config.properties",
        "--log-config", f"{ROOT}/log4j2.xml",
        "--model-store", f"{ROOT}/model-store",
        *sys.argv[1:],
    ]  # fmt: skip
    start()


if __name__ == "__main__":
    main()
