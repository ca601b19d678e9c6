"""docs/api.md: every command runs, in order, against a real server, with the status and the keys that stand there."""

import json
import re
import sys

from scripts.write_api_docs import Example, read_examples, run_example, show
from tests.conftest import ROOT, run_script

PAGE = ROOT / "docs" / "api.md"


def keys(value) -> object:
    """The keys of JSON, those of a list's first item; a cut list keeps its first item."""
    if isinstance(value, list):
        return [keys(value[0])] if value else []
    return {key: keys(inner) for key, inner in value.items()} if isinstance(value, dict) else None


def test_the_documented_commands_run_and_answer_as_documented(server):
    examples = read_examples(PAGE.read_text())
    assert len(examples) > 20
    ports = [int(address.rsplit(":", 1)[1]) for address in (server.inference, server.management, server.metrics)]
    for example in examples:
        now = run_example(example.command, ports, server.root)
        assert now.status == example.status, now
        [shown] = read_examples(show(now))
        if example.answer.startswith(("{", "[")):
            assert keys(json.loads(shown.answer)) == keys(json.loads(example.answer)), now.command
        elif example.command.endswith("/metrics"):
            names = {line.split("{")[0] for line in example.answer.splitlines()}
            assert names <= {line.split("{")[0] for line in shown.answer.splitlines()}
    assert [worker["status"] for worker in server.describe()["workers"]] == ["READY"]


def test_the_documented_program_classifies_and_names_what_is_refused(server):
    [program] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    program = program.replace("http://localhost:8080", server.inference)
    done = run_script(server.root, sys.executable, "-c", program)
    assert done.stdout == "Trouser\n", done.stderr
    refused = run_script(server.root, sys.executable, "-c", program.replace("golden/trouser_1.png", "handler.py"))
    assert "ValueError: torchserve/handler.py: 400 " in refused.stderr


def test_long_answers_are_cut():
    answer = json.dumps({"list": list(range(9)), "text": "x" * 500})
    [shown] = read_examples(show(Example("curl x", "200", answer)))
    assert json.loads(shown.answer) == {"list": [0, 1, 2, "..."], "text": "x" * 160 + "..."}
