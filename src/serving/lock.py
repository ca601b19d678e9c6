"""One at a time: whoever changes what is served, or by how many workers, holds the lock of ./run_torchserve.sh."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Busy(RuntimeError):
    """Somebody else changes what is served."""


def run_folder(store: Path) -> Path:
    """What ./run_torchserve.sh keeps of the server with the model store ``store``: its lock, its keys."""
    return store.parent / ".run"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock in ``run``, the folder torchserve/.run. Raises Busy at once when another holds it, OSError."""
    run.mkdir(mode=0o700, exist_ok=True)
    with (run / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(
                f"{run / 'lock'} is locked: another deploy, rollback, scale, drain or ./run_torchserve.sh is at work; "
                "try again after it"
            ) from error
        yield
