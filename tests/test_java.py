"""torchserve/java: the classes that lie in git are those that their sources give."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import ROOT

JAVA = ROOT / "torchserve" / "java"
JAR = Path(sysconfig.get_path("purelib")) / "ts" / "frontend" / "model-server.jar"


def test_the_classes_are_compiled_from_their_sources(tmp_path):
    compiler = shutil.which("javac")
    if (
        compiler is None
        or "javac 17." not in subprocess.run([compiler, "-version"], capture_output=True, text=True).stdout
    ):
        pytest.skip("needs the javac of a JDK 17; another one may order a class otherwise")
    command = [compiler, "--release", "17", "-g:none", "-d", tmp_path, "-cp", JAR, *JAVA.glob("*.java")]
    subprocess.run(command, check=True, timeout=60)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.class")}
    assert made == {path.relative_to(JAVA): path.read_bytes() for path in JAVA.rglob("*.class")}
