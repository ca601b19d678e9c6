"""The rooms of src/, from the top: who may import whom, and what may ship to a server."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ["image_limits", "plain_png", "styles", "preprocessing", "config", "data", "models", "inference", "image_files",
         "prediction_output", "training", "export", "serving", "predict"]  # fmt: skip
SHIPPED = ("image_limits", "plain_png", "styles", "preprocessing", "models", "inference")
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "torchserve": "ts"}  # where a package is imported under another name
FILES = sorted((ROOT / "src").rglob("*.py"))


def room_of(path: Path) -> str:
    """``src/models/storage.py`` -> ``models``."""
    return path.relative_to(ROOT / "src").parts[0].removesuffix(".py")


def nodes_of(tree: ast.AST, *, into_functions: bool):
    """Every node below ``tree``; what a function imports is needed only when it is called."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if into_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from nodes_of(node, into_functions=into_functions)


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names of the modules that a file imports; relative imports are resolved."""
    names = set()
    for node in nodes_of(ast.parse(path.read_text(), str(path)), into_functions=not top_level_only):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            names.add(".".join(filter(None, [package, node.module])))
            if node.module == "src":
                names |= {f"src.{alias.name}" for alias in node.names}
    return names


def server_packages() -> set[str]:
    """Top-level import names of torchserve/requirements.txt."""
    lines = (ROOT / "torchserve" / "requirements.txt").read_text().splitlines()
    names = [re.match(r"[\w.-]+", line).group().lower() for line in lines if re.match(r"\w", line)]
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


def test_every_file_of_src_lies_in_a_room():
    assert {room_of(path) for path in FILES} - {"__init__"} <= set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_from_rooms_above_it(path):
    room = room_of(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "src" and len(parts) > 1:
            assert ROOMS.index(parts[1]) <= ROOMS.index(room), f"{path} imports {name}"


def test_only_config_knows_hydra():
    users = set()
    for path in FILES:
        if {name.split(".")[0] for name in imported(path)} & {"hydra", "omegaconf"}:
            users.add(room_of(path))
    assert users == {"config"}


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in SHIPPED], ids=lambda path: path.name)
def test_what_ships_needs_only_the_server_packages(path):
    allowed = server_packages() | set(sys.stdlib_module_names)
    for name in imported(path, top_level_only=True):
        top = name.split(".")[0]
        if top == "src":
            assert name == "src" or name.split(".")[1] in SHIPPED, f"{path} imports {name}"
        else:
            assert top in allowed, f"{path} imports {name} at its top level"


def test_modules_do_not_import_each_other_in_a_circle():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    graph = {name: imported(path) & modules.keys() - {name} for name, path in modules.items()}
    done: set[str] = set()
    while ready := {name for name, needs in graph.items() if name not in done and needs <= done}:
        done |= ready
    assert done == graph.keys(), f"in a circle: {sorted(graph.keys() - done)}"
