"""One small run of the whole DVC pipeline in a copy of the checkout, for the tests of versioning and of tracking."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.conftest import HANG, copy_checkout, shrink_experiment


def run(folder: Path, *command: str, **environment: str) -> str:
    """Run ``command`` in ``folder`` as a fresh user would; return what it prints. A non-zero exit fails the test."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "MLFLOW_", "DVC_"))}
    settings = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(folder.parent / "dvc-site"),
        "OMP_NUM_THREADS": "1",  # the nets are so small that threads would only wait for each other
        "GIT_AUTHOR_NAME": "test",
        "GIT_AUTHOR_EMAIL": "test@localhost",
        "GIT_COMMITTER_NAME": "test",
        "GIT_COMMITTER_EMAIL": "test@localhost",
    }
    process = subprocess.Popen(
        command, cwd=folder, env=inherited | settings | environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=HANG)
    except BaseException:  # the test's own time limit among them: a stage must not outlive its test
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert process.returncode == 0, f"{' '.join(command)} exited {process.returncode}:\n{output}\n{errors}"
    return output


@functools.cache
def pipeline_folder(parent: Path, mirror: Path) -> Path:
    """A copy of the checkout below ``parent`` in which ``dvc repro`` has run with a tiny net on 1,000 images.

    ``mirror`` holds the official files. Made once for each ``parent``. Two commits: the checkout as it is, and the
    tiny experiment with its results.
    """
    folder = copy_checkout(parent / "pipeline" / "repository")
    run(folder, "git", "init", "--quiet")
    commit(folder, "as it is")
    shrink_experiment(folder)
    run(folder, "dvc", "repro", DATA_MIRROR=str(mirror))
    commit(folder, "a tiny experiment")
    return folder


def commit(folder: Path, message: str) -> None:
    """Commit everything in ``folder``."""
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", message)
