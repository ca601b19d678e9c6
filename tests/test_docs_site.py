"""The pages of docs/ build without a warning: links between them, and the docstrings of the Python reference."""

import sys

from tests.conftest import ROOT, run_script


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", f"{tmp_path}/cache", "docs"]
    built = run_script(ROOT, *command, str(tmp_path / "site"))
    assert built.returncode == 0, built.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in (tmp_path / "site").glob("*.html")}
    reference = (tmp_path / "site" / "reference.html").read_text()
    assert 'id="src.inference.predictor.Predictor.predict"' in reference
    assert 'href="../' not in (tmp_path / "site" / "runtimes.html").read_text(), "a link out of the site leads nowhere"


def test_make_docs_builds_the_same():
    plan = run_script(ROOT, "make", "-n", "docs")
    assert "sphinx-build -W --keep-going -q docs docs/_build" in plan.stdout
