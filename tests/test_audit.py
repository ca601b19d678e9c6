"""scripts/audit.py: its exit status, with an advisory service of the test's own in place of api.osv.dev."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, edited, run_script
from tests.file_server import Handler, serve

HOLE = {"id": "TEST-1", "summary": "found", "affected": [{"package": {"name": "numpy", "ecosystem": "PyPI"}}]}
ADVISORY = "v1/vulns/GHSA-8fxr-qfr9-p34w"  # the one that the script asks for to see whether the service answers
NOBODY = "http://127.0.0.1:1"


class Advisories(Handler):
    """Answers a question about a package with the file of its name; without one nothing is known of it."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.files.get(asked, b"{}"))


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What the script reads, and almost no code."""
    for name in ("src", "scripts", "benchmarks", "torchserve"):
        (tmp_path / name).mkdir()
    for name in ("pyproject.toml", "torchserve/requirements.txt"):
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "src" / "code.py").write_text("import json\n")
    return tmp_path


def audit(checkout: Path, service: str, on_github: bool = False) -> subprocess.CompletedProcess:
    script = checkout / "scripts" / "audit.py"
    script.write_text(edited(ROOT / "scripts" / "audit.py", {"https://api.osv.dev": service}))
    return run_script(checkout, sys.executable, str(script), GITHUB_ACTIONS="true" if on_github else "")


def test_where_the_service_does_not_answer_only_our_code_counts(checkout):
    done = audit(checkout, NOBODY)
    assert done.returncode == 0, done.stdout + done.stderr
    said = f"bandit: nothing found\nnot audited: the packages, for {NOBODY} does not answer (ConnectionError)\n"
    assert done.stdout == said
    assert audit(checkout, NOBODY, on_github=True).returncode == 1
    (checkout / "src" / "code.py").write_text("import pickle\n\npickle.loads(input().encode())\n")
    done = audit(checkout, NOBODY)
    assert done.returncode == 1
    assert "bandit: see above" in done.stdout


@pytest.mark.parametrize("hole", [False, True])
def test_a_package_with_a_hole_counts(hole, checkout):
    known = {"numpy": json.dumps({"vulns": [HOLE]}).encode()} if hole else {}
    with serve({ADVISORY: b"{}"} | known, Advisories) as service:
        done = audit(checkout, service.url)
    assert done.returncode == hole, done.stdout + done.stderr
    assert done.stdout.count("TEST-1") == 2 * hole, "the training environment has it, and a server"
