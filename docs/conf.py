"""How Sphinx builds these pages: ``make docs``, or ``sphinx-build -W --keep-going docs docs/_build``."""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # autodoc imports the modules of src/

settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
project = settings["name"]
version = release = settings["version"]
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3  # so that a link may name a heading: page.md#heading
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # Lightning's own link to pages that are not here
html_theme = "furo"
html_title = project
html_show_copyright = False
