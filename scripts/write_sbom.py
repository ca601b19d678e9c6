"""Write sbom.json, the bill of materials of a server, as CycloneDX 1.6: ``make sbom``.

In it are the packages of torchserve/.venv with their licences, TorchServe's Java server with the Netty in it, and the
model archives of torchserve/model-store; server and archives with their SHA-256.
"""

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / "torchserve" / ".venv" / "bin" / "python"
STORE = ROOT / "torchserve" / "model-store"
JAR = "ts/frontend/model-server.jar"
NETTY = "META-INF/io.netty.versions.properties"  # in that jar; its other libraries left no version there
TIMEOUT = 300  # seconds


def component(path: Path, kind: str, name: str) -> dict:
    """A file as a CycloneDX component of type ``kind``; its version is its SHA-256."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {
        "type": kind,
        "bom-ref": f"{name}@{digest}",
        "name": name,
        "version": digest,
        "hashes": [{"alg": "SHA-256", "content": digest}],
    }


def list_netty(jar: Path) -> list[dict]:
    """The modules of Netty, which reads every request, in TorchServe's jar."""
    with zipfile.ZipFile(jar) as opened:
        found = re.findall(r"^(netty-[\w-]+)\.version=(\S+)", opened.read(NETTY).decode(), re.MULTILINE)
    return [
        {"type": "library", "bom-ref": purl, "group": "io.netty", "name": name, "version": version, "purl": purl}
        for name, version in sorted(set(found))
        for purl in [f"pkg:maven/io.netty/{name}@{version}"]
    ]


def list_packages() -> dict:
    """The serving environment's packages as a CycloneDX document. Raises CalledProcessError."""
    command = ("cyclonedx_py", "environment", "--output-reproducible", "--spec-version", "1.6", "--of", "JSON")
    done = subprocess.run([sys.executable, "-m", *command, PYTHON], capture_output=True, check=True, timeout=TIMEOUT)
    return json.loads(done.stdout)


def build() -> dict:
    """The whole document. Raises FileNotFoundError where there is no server to describe."""
    archives = sorted(STORE.glob("*.mar"))
    if not PYTHON.exists() or not archives:
        raise FileNotFoundError(f"no environment {PYTHON} or no archive in {STORE}; run ./run_torchserve.sh first")
    document = list_packages()
    [jar] = PYTHON.parents[1].glob(f"lib/python3*/site-packages/{JAR}")
    document["components"] += [component(jar, "library", JAR), *list_netty(jar)]
    document["components"] += [component(path, "machine-learning-model", path.name) for path in archives]
    return document


def main() -> int:
    try:
        document = build()
    except (FileNotFoundError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = json.dumps(document, indent=2) + "\n"
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        print(f"error: the document is no CycloneDX 1.6: {error}", file=sys.stderr)
        return 1
    (ROOT / "sbom.json").write_text(text)
    print(f"wrote sbom.json ({len(document['components'])} components)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
