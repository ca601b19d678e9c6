"""Makefile, and the hooks of git that check what `make lint` checks."""

import re
import shlex

import pytest
import yaml

from tests.conftest import ROOT, run_script


@pytest.mark.parametrize("mirror", ["/a folder/data", "../beside", "https://mirror.test/data"])
def test_the_mirror_that_is_named_is_passed_on_as_it_is(mirror):
    done = run_script(ROOT, "make", "--silent", "--eval=shown: ; @printenv DATA_MIRROR", "shown", DATA_MIRROR=mirror)
    assert done.stdout == f"{mirror}\n", done.stderr


def test_the_hooks_check_the_shell_scripts_that_make_lint_checks():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook for repository in repositories for hook in repository["hooks"] if hook["id"] == "shellcheck"]
    commands = re.findall(r"^\tshellcheck (.*)$", (ROOT / "Makefile").read_text(), re.M)
    names = [path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*"), *ROOT.glob("*/*")]]
    for hook, command in zip(hooks, commands, strict=True):
        words = shlex.split(command)
        assert hook["args"] == [word for word in words if word.startswith("--")]
        files = {path.relative_to(ROOT).as_posix() for word in words if word[0] != "-" for path in ROOT.glob(word)}
        assert {name for name in names if re.search(hook["files"], name)} == files
