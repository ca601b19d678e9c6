"""An S3 remote whose keys may only read, as docs/data_and_experiments.md shows it: DVC pulls, and cannot push."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_script
from tests.pipeline_copy import run
from tests.s3_server import EVERYTHING, checked_s3

PAGE = (ROOT / "docs" / "data_and_experiments.md").read_text()
POLICY = json.loads(PAGE.split("```json\n")[1].split("```")[0])  # the one that the page tells people to use
BUCKET, PREFIX = "my-bucket", "fashion-mnist"


@pytest.fixture
def store():
    """``(endpoint, a writer's keys, a reader's keys)``."""
    with checked_s3(BUCKET, EVERYTHING, POLICY) as found:
        yield found


def forget(folder: Path) -> None:
    """Delete the data and DVC's cache of it."""
    shutil.rmtree(folder / ".dvc" / "cache")
    (folder / "data.bin").unlink()


def test_a_reader_pulls_and_cannot_push(store, tmp_path):
    endpoint, writer, reader = store
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "data.bin").write_bytes(bytes(1000))
    run(folder, "git", "init", "--quiet")
    run(folder, "dvc", "init", "--quiet")
    run(folder, "dvc", "add", "data.bin")
    run(folder, "dvc", "remote", "add", "--default", "s3", f"s3://{BUCKET}/{PREFIX}")
    run(folder, "dvc", "remote", "modify", "s3", "endpointurl", endpoint)
    run(folder, "dvc", "push", **writer)
    forget(folder)
    run(folder, "dvc", "pull", **reader)
    assert (folder / "data.bin").read_bytes() == bytes(1000)

    (folder / "data.bin").write_bytes(b"changed")
    run(folder, "dvc", "add", "data.bin")
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    refused = run_script(folder, "dvc", "push", PATH=path, DVC_SITE_CACHE_DIR=f"{tmp_path}/dvc-site", **reader)
    assert refused.returncode != 0
    assert "Access Denied" in refused.stderr, refused.stderr
    forget(folder)
    lost = run_script(folder, "dvc", "pull", PATH=path, DVC_SITE_CACHE_DIR=f"{tmp_path}/dvc-site", **reader)
    assert lost.returncode != 0, "what was refused is not in the bucket"


def test_the_commands_of_the_page_add_a_remote_that_git_does_not_see(tmp_path):
    run(tmp_path, "git", "init", "--quiet")
    run(tmp_path, "dvc", "init", "--quiet")
    before = (tmp_path / ".dvc" / "config").read_text()
    section = PAGE.split("### A remote that may only be read\n")[1].split("\n## ")[0]
    commands = [line.split() for line in section.splitlines() if line.startswith("dvc remote ")]
    assert [command[2] for command in commands] == ["add", "modify"]
    for command in commands:
        run(tmp_path, *command)
    assert run(tmp_path, "dvc", "remote", "list").split() == ["read-only", f"s3://{BUCKET}/{PREFIX}"]
    assert "allow_anonymous_login = true" in (tmp_path / ".dvc" / "config.local").read_text()
    assert (tmp_path / ".dvc" / "config").read_text() == before
    assert ".dvc/config.local" not in run(tmp_path, "git", "status", "--porcelain", "--untracked-files=all")


def test_dvc_reports_to_nobody_from_a_test(tmp_path):
    program = "from dvc.analytics import is_enabled; print(is_enabled())"
    assert run(tmp_path, sys.executable, "-c", program) == "False\n"
    assert run_script(tmp_path, sys.executable, "-c", program).stdout == "False\n"
