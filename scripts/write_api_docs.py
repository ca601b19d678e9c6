"""Run every command of docs/api.md against a real server and write its answer below it: ``make pages``."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from src.serving.ports import free_ports

EXAMPLE = re.compile(
    r"```bash\n(?P<command>.*?)\n```\n(?:\n`(?P<status>\w+)`:\n\n```\w+\n(?P<answer>.*?)\n```\n)?", re.DOTALL
)
METRICS = r"Predictions|RejectedInputs|Confidence_(count|sum)|StageSeconds_(count|sum)|Holds|Requests[24]XX|ts_"
LONGEST = 160  # characters of a string that are shown


@dataclass(frozen=True)
class Example:
    """A command of docs/api.md; ``status`` is the HTTP status, or "done" for another command than curl."""

    command: str
    status: str
    answer: str


def read_examples(text: str) -> list[Example]:
    """The commands in ``text`` with the answers that stand there; "" where none does."""
    return [Example(match["command"], match["status"] or "", match["answer"] or "") for match in EXAMPLE.finditer(text)]


def run_example(command: str, ports: list[int], folder: Path) -> Example:
    """Run ``command`` in ``folder`` with ``ports`` in place of 8080, 8081 and 8082. Raises CalledProcessError."""
    line = re.sub(r"localhost:808([012])", lambda match: f"localhost:{ports[int(match[1])]}", command)
    line = re.sub(r"^curl ", r"curl -sS --max-time 120 -w '\\n%{http_code}' ", line)
    done = subprocess.run(["bash", "-euc", line], cwd=folder, capture_output=True, text=True, timeout=400, check=True)
    if not command.startswith("curl "):
        return Example(command, "done", done.stdout.strip())
    answer, _, status = done.stdout.rpartition("\n")
    return Example(command, status, answer.strip())


def shorten(value):
    """JSON with long lists and strings cut."""
    if isinstance(value, dict):
        return {key: shorten(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shorten(inner) for inner in value[:3]] + (["..."] if len(value) > 3 else [])
    return value[:LONGEST] + "..." if isinstance(value, str) and len(value) > LONGEST else value


def show(example: Example) -> str:
    """``example`` as it stands in docs/api.md."""
    try:
        kind, answer = "json", json.dumps(shorten(json.loads(example.answer)), indent=2, ensure_ascii=False)
    except json.JSONDecodeError:
        lines = example.answer.splitlines()
        kind, answer = "text", "\n".join(line for line in lines if len(lines) < 20 or re.match(METRICS, line))
    return f"```bash\n{example.command}\n```\n\n`{example.status}`:\n\n```{kind}\n{answer}\n```\n"


def main() -> int:
    page = ROOT / "docs" / "api.md"
    second = ROOT / "torchserve" / "model-store" / "fashion_mnist_v2.mar"
    ports = free_ports(3)
    subprocess.run(["./run_torchserve.sh", "--native", "--ports", ",".join(map(str, ports))], cwd=ROOT, check=True)
    try:
        text = page.read_text()
        page.write_text(EXAMPLE.sub(lambda match: show(run_example(match["command"], ports, ROOT)), text))
    finally:
        second.unlink(missing_ok=True)
        subprocess.run(["./run_torchserve.sh", "--stop"], cwd=ROOT, check=True)
    print(f"wrote {len(read_examples(text))} answers into {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
