"""torchserve/java: the class that lies in git is the one that its source gives."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import ROOT

JAVA = ROOT / "torchserve" / "java"
JAR = Path(sysconfig.get_path("purelib")) / "ts" / "frontend" / "model-server.jar"


def test_the_class_is_compiled_from_its_source(tmp_path):
    compiler = shutil.which("javac")
    if (
        compiler is None
        or "javac 17." not in subprocess.run([compiler, "-version"], capture_output=True, text=True).stdout
    ):
        pytest.skip("needs the javac of a JDK 17; another one may order a class otherwise")
    source = JAVA / "HttpPostRequestDecoder.java"
    subprocess.run([compiler, "--release", "17", "-g:none", "-d", tmp_path, "-cp", JAR, source], check=True, timeout=60)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.class")}
    assert made == {path.relative_to(JAVA): path.read_bytes() for path in JAVA.rglob("*.class")}
