"""Who is compared: this project, a stock TorchServe handler, and other servers, each in an environment of its own."""

import hashlib
import subprocess
import sysconfig
from pathlib import Path

from benchmarks.servers import ONE_THREAD, ROOT, Launch, ServerError
from benchmarks.torchserve import PYTHON, Setting, prepare
from src.serving.ports import free_ports

PEERS = ROOT / "benchmarks" / "peers"
ENVIRONMENTS = ROOT / "benchmarks" / ".venv"
STOCK = PEERS / "stock_handler.py"
NAMES = {
    "project": "this project",
    "project-fastapi": "this project's FastAPI server",
    "stock": "TorchServe, stock handler, OMP_NUM_THREADS=1",
    "stock-threads": "TorchServe, stock handler",
    "fastapi": "FastAPI + uvicorn",
    "litserve": "LitServe",
    "bentoml": "BentoML",
    "mlflow": "MLflow",
    "ray": "Ray Serve",
}
STOCK_MODEL = {"batchSize": 1, "maxBatchDelay": 100}  # TorchServe's own defaults


def make_environment(name: str) -> Path:
    """The Python of the environment of peer ``name``, made if it is missing or its requirements changed.

    It sees the packages of torchserve/.venv (torch, numpy, Pillow...) behind its own, so that all run the same ones.
    Its packages are compiled: to compile them anew at each start would take Ray longer than it waits for itself.
    Raises ServerError when pip cannot install benchmarks/peers/NAME.txt.
    """
    requirements, folder = PEERS / f"{name}.txt", ENVIRONMENTS / name
    python, stamp = folder / "bin" / "python", folder / ".requirements"
    serving = ROOT / "torchserve" / "requirements.txt"
    wanted = hashlib.sha256(requirements.read_bytes() + serving.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"making the environment of {name}", flush=True)
    subprocess.run([PYTHON, "-m", "venv", "--clear", folder], check=True, timeout=300)
    site = {}
    for base in (folder, PYTHON.parents[1]):
        site[base] = Path(sysconfig.get_path("purelib", "venv", {"base": str(base)}))
    (site[folder] / "serving.pth").write_text(f"{site[PYTHON.parents[1]]}\n")
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "-r", requirements], capture_output=True, text=True, timeout=1800)
    if done.returncode != 0:
        raise ServerError(f"pip could not install {requirements.name}: {done.stderr[-600:]}")
    stamp.write_text(wanted)
    return python


def version_of(name: str) -> str:
    """The pinned packages of a peer; TorchServe's for the others."""
    path = PEERS / f"{name}.txt"
    if path.is_file():
        return path.read_text().replace("\n", " ").strip()
    lines = (ROOT / "torchserve" / "requirements.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torchserve=="))


def launch(name: str, folder: Path, workers: int, runtime: str) -> Launch:
    """How contender ``name`` is started; what it needs to be written goes into ``folder``. Raises ServerError."""
    counts = {"minWorkers": workers, "maxWorkers": workers}
    if name == "project":
        return prepare(Setting(model=counts), folder)[0]
    if name.startswith("stock"):
        threads = ONE_THREAD if name == "stock" else {}
        model = counts | STOCK_MODEL
        stock = {"shipped_config": False, "log_config": None, "java": None, "handler": STOCK}
        return prepare(Setting(model, environment=threads, **stock), folder)[0]
    python = make_environment(name)
    (port,) = free_ports(1)
    environment = {"PYTHONPATH": str(ROOT), "PEER_RUNTIME": runtime} | ONE_THREAD
    address, program = f"http://127.0.0.1:{port}", str(python.parent)
    numbers = [str(port), str(workers)]
    if name == "fastapi":
        command = [f"{program}/uvicorn", "benchmarks.peers.fastapi_app:app", "--workers", str(workers)]
        command += ["--port", str(port), "--log-level", "warning", "--no-access-log"]
        return Launch(command, f"{address}/predict", "raw", environment)
    if name == "project-fastapi":
        command = [str(python), "-m", "src.serving.fastapi_app", "--model-path", str(ROOT / "models" / "best_model")]
        command += ["--runtime", runtime, "--workers", str(workers), "--port", str(port)]
        return Launch(command, f"{address}/predict", "raw", environment)
    if name == "bentoml":
        command = [f"{program}/bentoml", "serve", "benchmarks.peers.bentoml_app:Classifier", "--port", str(port)]
        environment |= {"WORKERS": str(workers), "BENTOML_HOME": str(folder), "BENTOML_DO_NOT_TRACK": "True"}
        return Launch([*command, "--host", "127.0.0.1", "-q"], f"{address}/predict", "list", environment)
    if name == "mlflow":
        model = save_mlflow_model(python, folder, environment)
        command = [f"{program}/mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
        environment |= {"PATH": f"{program}:/usr/local/bin:/usr/bin:/bin"}
        command += ["-p", str(port), "-w", str(workers)]
        return Launch(command, f"{address}/invocations", "mlflow", environment)
    if name == "ray":
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(folder)}
        return Launch([str(python), "-m", "benchmarks.peers.ray_app", *numbers], f"{address}/", "raw", environment)
    return Launch(
        [str(python), "-m", f"benchmarks.peers.{name}_app", *numbers], f"{address}/predict", "json", environment
    )


def save_mlflow_model(python: Path, folder: Path, environment: dict[str, str]) -> Path:
    """The folder that ``mlflow models serve`` is given."""
    target = folder / "model"
    done = subprocess.run(
        [python, "-m", "benchmarks.peers.mlflow_app", target],
        cwd=folder, env=environment | {"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    if done.returncode != 0:
        raise ServerError(f"MLflow could not save the model: {done.stderr[-600:]}")
    return target
