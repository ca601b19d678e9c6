"""Look for known holes: bandit in our code, pip-audit in what it installs. ``make audit`` runs it.

Exit status: 0 nothing found, 1 something found. Where the advisory service does not answer (an offline machine), it
says "not audited" and the packages do not count; on GitHub Actions, where it always answers, that is 1 too.
Exceptions and their reasons stand in pyproject.toml, under tool.bandit and tool.audit.
"""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import requests

ROOT = Path(__file__).resolve().parents[1]
SERVICE = "https://api.osv.dev"
CODE = ("src", "scripts", "benchmarks", *map(str, [*ROOT.glob("*.py"), *ROOT.glob("torchserve/*.py")]))
# What is installed here, and what a server installs.
PACKAGES = {
    "the training environment": [],
    "a server": ["--no-deps", "--disable-pip", "-r", "torchserve/requirements.txt"],
}
TIMEOUT = 600  # seconds for one tool


def run(*arguments: str) -> bool:
    """Run a module of this environment; whether it found nothing."""
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, timeout=TIMEOUT).returncode == 0


def why_unreachable() -> str:
    """Why the advisory service does not answer; "" when it does."""
    try:
        # Any advisory will do; this one is of TorchServe and stays.
        requests.get(f"{SERVICE}/v1/vulns/GHSA-8fxr-qfr9-p34w", timeout=10).raise_for_status()
    except requests.RequestException as error:
        return type(error).__name__
    return ""


def main() -> int:
    exceptions = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["audit"]["exceptions"]
    clean = run("bandit", "--quiet", "--recursive", "--configfile", "pyproject.toml", *CODE)
    print(f"bandit: {'nothing found' if clean else 'see above'}", flush=True)
    if reason := why_unreachable():
        print(f"not audited: the packages, for {SERVICE} does not answer ({reason})")
        return 0 if clean and os.environ.get("GITHUB_ACTIONS") != "true" else 1
    ignored = [word for name in exceptions for word in ("--ignore-vuln", name)]
    asking = ["--vulnerability-service", "osv", "--osv-url", f"{SERVICE}/v1/query", "--progress-spinner", "off"]
    for name, options in PACKAGES.items():
        print(f"pip-audit of {name}:", flush=True)
        clean &= run("pip_audit", *asking, *options, *ignored)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
