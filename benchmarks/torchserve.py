"""TorchServe with this project's archive, started as ./run_torchserve.sh does, with single settings changed."""

import json
import subprocess
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from benchmarks.servers import ROOT, Launch
from src.serving.ports import free_ports
from src.serving.settings import read_properties

ARCHIVE = ROOT / "torchserve" / "model-store" / "fashion_mnist.mar"
PYTHON = ROOT / "torchserve" / ".venv" / "bin" / "python"
PROPERTIES = ROOT / "torchserve" / "config.properties"
SHIPPED_LOG = ROOT / "torchserve" / "log4j2.xml"
SHIPPED_JAVA = ROOT / "torchserve" / "java"
CHOOSE_JAVA = """
say() { :; }
fail() { echo "error: $*" >&2; exit 1; }
source torchserve/environment.sh
choose_java
echo "$JAVA_HOME"
"""
ADDRESSES = ("inference_address", "management_address", "metrics_address")


@dataclass(frozen=True)
class Setting:
    """What differs from what ships: lines of config.properties, keys of model-config.yaml, the handler's file."""

    model: dict = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    shipped_config: bool = True  # False: no line of torchserve/config.properties
    log_config: Path | None = SHIPPED_LOG  # None: TorchServe's own
    java: Path | None = SHIPPED_JAVA  # None: TorchServe's own classes alone
    handler: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


def require_no_server() -> None:
    """Exit with the remedy when a server of this checkout is running: a benchmark's own would take its place."""
    if (ROOT / "torchserve" / ".run" / "running").exists():
        raise SystemExit("error: a server of this checkout is running; stop it with ./run_torchserve.sh --stop")


def build_archive() -> dict:
    """Make the serving environment and the archive as ./run_torchserve.sh does; return the model-config.yaml in it."""
    require_no_server()
    ports = ",".join(map(str, free_ports(3)))
    script, options = ROOT / "run_torchserve.sh", {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 900}
    try:
        done = subprocess.run([script, "--native", "--ports", ports], **options)
    finally:
        subprocess.run([script, "--stop"], **options)
    if done.returncode != 0:
        raise SystemExit(f"error: run_torchserve.sh failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    with zipfile.ZipFile(ARCHIVE) as archive:
        return yaml.safe_load(archive.read("model-config.yaml"))


def prepare(setting: Setting, folder: Path) -> tuple[Launch, dict[str, str]]:
    """Write what the server needs into ``folder``: its Launch, and its three addresses by name."""
    store, logs, tmp = folder / "model-store", folder / "logs", folder / "tmp"
    for path in (store, logs, tmp):
        path.mkdir(parents=True, exist_ok=True)
    repack(ARCHIVE, store / ARCHIVE.name, setting)
    addresses = dict(zip(ADDRESSES, (f"http://127.0.0.1:{port}" for port in free_ports(3)), strict=True))
    lines = read_properties(PROPERTIES.read_text(), PROPERTIES.name) if setting.shipped_config else {}
    if setting.shipped_config:
        lines["metrics_config"] = str(ROOT / "torchserve" / "metrics.yaml")
    if setting.java:
        for name in ("io", "org"):
            (folder / name).symlink_to(setting.java / name)
    lines |= {"grpc_inference_port": "0", "grpc_management_port": "0"} | addresses | setting.config
    (folder / "config.properties").write_text("".join(f"{key}={value}\n" for key, value in lines.items()))
    command = [str(PYTHON), "-c", "from ts.model_server import start; start()", "--start", "--foreground", "--ncs"]
    command += ["--disable-token-auth", "--ts-config", str(folder / "config.properties"), "--model-store", str(store)]
    command += ["--models", f"fashion_mnist={ARCHIVE.name}"]
    if setting.log_config:
        command += ["--log-config", str(setting.log_config)]
    environment = {"JAVA_HOME": java_home(), "TMPDIR": str(tmp), "TEMP": str(tmp)}
    environment |= {"LOG_LOCATION": str(logs), "METRICS_LOCATION": str(logs)}
    url = f"{addresses['inference_address']}/predictions/fashion_mnist"
    return Launch(command, url, "raw", environment | setting.environment, True, folder), addresses


def repack(source: Path, target: Path, setting: Setting) -> None:
    """Copy an archive, with another handler and other keys of model-config.yaml where ``setting`` has them."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        handler = json.loads(old.read("MAR-INF/MANIFEST.json"))["model"]["handler"]
        for name in old.namelist():
            content = old.read(name)
            if name == "model-config.yaml":
                content = yaml.safe_dump(yaml.safe_load(content) | setting.model).encode()
            elif name == handler and setting.handler:
                content = setting.handler.read_bytes()
            new.writestr(name, content)


def java_home() -> str:
    """The Java that ./run_torchserve.sh takes. Exits with its message where there is none that will do."""
    done = subprocess.run(["bash", "-euc", CHOOSE_JAVA], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise SystemExit(done.stderr.strip())
    return done.stdout.strip()
