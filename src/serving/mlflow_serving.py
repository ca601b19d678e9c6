"""MLflow's registry and server for a trained model: ``python -m src.serving.mlflow_serving COMMAND``.

``register`` puts a model folder into the registry, ``serve`` runs ``mlflow models serve``, ``status`` and ``predict``
ask a running server. The store is the one of MLFLOW_TRACKING_URI, or else of configs/config.yaml.
"""

import argparse
import base64
import json
import os
import socket
import sys
from pathlib import Path

from src.image_files import read_image
from src.inference.predictor import attempt
from src.inference.runtimes import FILES
from src.preprocessing import ImageError
from src.serving.client import Refused, call

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "http://127.0.0.1:5001"
IMAGES = 64  # of ``predict`` in one request
TIMEOUT = 60  # seconds for one answer


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    registering = commands.add_parser(
        "register", help="put a model folder into the registry, print models:/NAME/VERSION"
    )
    registering.add_argument("--model-path", type=Path, default=Path("models/best_model"), help="default: %(default)s")
    registering.add_argument("--name", help="of the registered model; default: the one in config.json")
    registering.add_argument("--runtime", choices=list(FILES), default="onnx-int8", help="default: %(default)s")
    serving = commands.add_parser("serve", help="answer /invocations and /ping until it is stopped")
    serving.add_argument("--model-uri", required=True, help="what register prints")
    serving.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine only")
    serving.add_argument("--port", type=int, default=5001, help="default: %(default)s")
    serving.add_argument("--workers", type=int, default=2, help="processes: %(default)s")
    shown = commands.add_parser("status", help="which model and version a server answers with; exit 1 without one")
    asking = commands.add_parser("predict", help="send image files and print the answers as JSON")
    asking.add_argument("image", type=Path, nargs="+")
    for command in (shown, asking):
        command.add_argument("--url", type=address, default=ADDRESS, help="of the server: %(default)s")
    return parser


def address(text: str) -> str:
    """``http://HOST:PORT`` without a slash at its end. Raises ArgumentTypeError."""
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} is no address; give one such as {ADDRESS}")
    return text.rstrip("/")


def serve(uri: str, host: str, port: int, workers: int) -> None:
    """Become ``mlflow models serve``; does not return. Raises OSError for an address that cannot be listened at."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"cannot listen at {host}, port {port} ({error.strerror}); choose with --host and --port"
            ) from error
    environment = {"OMP_NUM_THREADS": "1"} | os.environ  # each worker would start a thread a core
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # it calls uvicorn
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", uri, "--env-manager", "local"]
    command += ["--host", host, "--port", str(port), "--workers", str(workers)]
    # Not a child: a signal to this process stops the server.
    os.execve(sys.executable, command, environment)  # noqa: S606


def invoke(url: str, images: list[str], params: dict) -> list[dict]:
    """POST base64 strings to /invocations and return its predictions. Raises OSError, or ValueError for nonsense."""
    body = json.dumps({"inputs": images, "params": params}).encode()
    try:
        answer = json.loads(call(f"{url}/invocations", body, "application/json", timeout=TIMEOUT))
    except Refused:
        raise
    except OSError as error:
        raise OSError(f"nothing answers at {url} ({error}); start a server with: make serve-mlflow") from error
    except json.JSONDecodeError:
        answer = None
    if not isinstance(answer, dict) or not isinstance(answer.get("predictions"), list):
        raise ValueError(f"what answers at {url} is no MLflow server")
    return answer["predictions"]


def status(url: str) -> dict:
    """What the server at ``url`` serves. Raises OSError when none answers, ValueError when it is another model's."""
    found = invoke(url, [], {"describe": True})
    if len(found) != 1 or "registered_name" not in found[0]:
        raise ValueError(f"{url} serves a model that `register` did not make")
    return {"url": url, "mlflow": call(f"{url}/version").decode(), **found[0]}


def predict(url: str, paths: list[Path]) -> list[dict]:
    """One answer a file, with its name; a file that is no image, or cannot be read, gets ``code``, ``type`` and
    ``message``."""
    answers: list[dict] = []
    for start in range(0, len(paths), IMAGES):
        read = [attempt(read_image, path) for path in paths[start : start + IMAGES]]
        texts = [base64.b64encode(data).decode() for data in read if not isinstance(data, ImageError)]
        given = iter(invoke(url, texts, {"bad_images": "report"}) if texts else ())
        answers += [data.as_dict() if isinstance(data, ImageError) else next(given) for data in read]
    return [{"filename": str(path), **answer} for path, answer in zip(paths, answers, strict=True)]


def with_registry(arguments: argparse.Namespace) -> None:
    """``register`` and ``serve``. Raises ValueError or OSError; MLflow is imported here, which takes seconds."""
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    from src.config import DEFAULT_CONFIG, load_config
    from src.serving.mlflow_registry import register

    tracking = os.environ.get("MLFLOW_TRACKING_URI") or load_config(ROOT / DEFAULT_CONFIG).tracking.uri
    os.environ["MLFLOW_TRACKING_URI"] = tracking  # for the server that ``serve`` becomes
    mlflow.set_tracking_uri(tracking)
    try:
        if arguments.command == "serve":
            mlflow.models.get_model_info(arguments.model_uri)
            serve(arguments.model_uri, arguments.host, arguments.port, arguments.workers)
        uri, new = register(arguments.model_path, arguments.name, arguments.runtime)
    except (MlflowException, SQLAlchemyError) as error:
        raise ValueError(f"{error} (the store is {tracking})") from error
    if not new:
        print(f"{arguments.model_path} is registered already", file=sys.stderr)
    print(uri)


def run(arguments: argparse.Namespace) -> int:
    """Do what the command says; return the exit status. Raises ValueError or OSError."""
    match arguments.command:
        case "register" | "serve":
            with_registry(arguments)
        case "status":
            print(json.dumps(status(arguments.url), indent=2))
        case "predict":
            answers = predict(arguments.url, arguments.image)
            print(json.dumps(answers, indent=2))
            return 1 if any("code" in answer for answer in answers) else 0
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "serve" and arguments.workers < 1:
        parser.error(f"--workers is {arguments.workers}; it must be at least 1")
    if arguments.command == "serve" and not 0 < arguments.port < 65536:
        parser.error(f"--port is {arguments.port}; it must lie between 1 and 65535")
    try:
        return run(arguments)
    except (ValueError, OSError) as error:  # ModelError and Refused are among them
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
