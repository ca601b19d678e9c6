"""src/data/download.py over a real server: resumed, retried, verified, and from the next mirror when one fails."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from src.data import download
from src.data.download import DownloadError, fetch
from src.data.fashion_mnist import FILES, SUBFOLDER
from src.serving.ports import free_ports
from tests.conftest import ROOT, run_script
from tests.file_server import serve

CONTENT = np.random.default_rng(0).bytes(300_000)
CHECKSUM = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
WRONG = bytes(reversed(CONTENT))


@pytest.fixture
def target(tmp_path, monkeypatch):
    """Where the file goes; retries do not wait."""
    monkeypatch.setattr(download, "RETRIES", download.RETRIES.new(backoff_factor=0))
    return tmp_path / "raw" / "file.gz"


@pytest.fixture
def server():
    with serve({"file.gz": CONTENT}) as running:
        yield running


def get(target, *mirrors: str):
    """Fetch the file and check that it is whole and nothing lies beside it."""
    assert fetch("file.gz", CHECKSUM, target, list(mirrors)) == target
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_file_is_downloaded_once(server, target):
    get(target, server.url)
    get(target, server.url + "/")
    assert server.requests == [("file.gz", None)]


def test_a_damaged_file_is_fetched_again(server, target):
    target.parent.mkdir()
    target.write_bytes(WRONG)
    get(target, server.url)


def test_a_connection_that_breaks_is_taken_up_where_it_stopped(server, target):
    server.faults["file.gz"] = [100_000, 50_000, 65_000]
    get(target, server.url)
    starts = [int(wanted.removeprefix("bytes=").removesuffix("-")) for _, wanted in server.requests[1:]]
    for start, sent in zip(starts, (100_000, 150_000, 215_000), strict=True):
        assert sent - 3 * download.CHUNK < start <= sent


def test_a_connection_may_break_often_while_bytes_come(server, target):
    server.faults["file.gz"] = [30_000] * 9
    get(target, server.url)
    assert len(server.requests) == 10


def test_a_server_that_always_breaks_at_once_is_given_up(server, target):
    server.faults["file.gz"] = [0] * 50
    with pytest.raises(DownloadError, match=r"file\.gz"):
        fetch("file.gz", CHECKSUM, target, [server.url])
    assert len(server.requests) < 20


def test_an_interrupted_download_goes_on_in_the_next_run(server, target):
    target.parent.mkdir()
    (target.parent / "file.gz.part").write_bytes(CONTENT[:123_456])
    get(target, server.url)
    assert server.requests == [("file.gz", "bytes=123456-")]


def test_a_server_without_ranges_starts_again(server, target):
    target.parent.mkdir()
    (target.parent / "file.gz.part").write_bytes(CONTENT[:1000])
    server.faults["file.gz"] = ["no_range"]
    get(target, server.url)


@pytest.mark.parametrize("left_over", [WRONG[:1000], WRONG, CONTENT + b"more", CONTENT, b""])
def test_whatever_an_earlier_run_left_the_file_is_had(server, target, left_over):
    target.parent.mkdir()
    (target.parent / "file.gz.part").write_bytes(left_over)
    get(target, server.url)


def test_a_passing_500_is_retried(server, target):
    server.faults["file.gz"] = ["500", "500"]
    get(target, server.url)
    assert len(server.requests) == 3


def test_the_next_mirror_helps_out(server, target, tmp_path):
    with serve({"file.gz": WRONG}) as liar, serve({}) as empty:
        closed = f"http://127.0.0.1:{free_ports(1)[0]}"
        get(target, closed, empty.url, str(tmp_path / "no folder"), liar.url, server.url)


def test_a_mirror_that_breaks_off_with_a_wrong_file_spoils_no_other(server, target):
    with serve({"file.gz": WRONG}) as liar:
        liar.faults["file.gz"] = [1000] + [0] * 20
        get(target, liar.url, server.url)


def test_a_local_folder_is_a_mirror(target, tmp_path):
    (tmp_path / "file.gz").write_bytes(CONTENT)
    get(target, str(tmp_path))


def test_when_all_mirrors_fail_each_is_named_with_its_reason(target, tmp_path):
    with serve({"file.gz": WRONG}) as liar, serve({}) as empty, serve({"file.gz": CONTENT}) as failing:
        failing.faults["file.gz"] = ["500"] * 20
        mirrors = [liar.url, empty.url, failing.url, str(tmp_path / "nowhere")]
        with pytest.raises(DownloadError) as error:
            fetch("file.gz", CHECKSUM, target, mirrors)
    message = str(error.value)
    for mirror, reason in zip(mirrors, (CHECKSUM, "404", "500", "No such file"), strict=True):
        line = next(line for line in message.splitlines() if f"{mirror}/file.gz" in line)
        assert reason in line
    assert "DATA_MIRROR" in message
    assert not target.exists()


def test_ci_makes_a_mirror_that_the_tests_find(mirror, tmp_path):
    """The step of ci.yml, with this environment's Python and files that were downloaded before."""
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["checks"]["steps"]
    (cache,) = (step["with"]["path"] for step in steps if step.get("uses", "").startswith("actions/cache"))
    (script,) = (step["run"] for step in steps if "src/data/prepare.py" in step.get("run", ""))
    script = script.replace("make env\n", "").replace(".venv/bin/python", sys.executable)
    environment = {"HOME": str(tmp_path), "GITHUB_ENV": f"{tmp_path}/environment", "DATA_MIRROR": str(mirror)}
    done = run_script(ROOT, "bash", "-e", "-c", script, **environment)
    assert done.returncode == 0, done.stderr
    made = Path((tmp_path / "environment").read_text().strip().removeprefix("DATA_MIRROR="))
    assert {path.name for path in (made / SUBFOLDER).iterdir()} == FILES.keys()
    assert cache.replace("~", str(tmp_path)) == str(made / SUBFOLDER)
