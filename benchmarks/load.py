"""The load that all benchmarks put on a server: wrk with one thread, and the images it sends."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from src.serving.load_requests import encode_png, load_images

IMAGES = 256
SCRIPT = Path(__file__).with_name("wrk.lua")
DATA = Path("data/fashion_mnist/test.npz")
JSON_FORMS = {
    "json": lambda text: {"image": text},
    "list": lambda text: {"image": [text]},  # BentoML's batches
    "mlflow": lambda text: {"inputs": {"image": [text]}},
}
CONTENT_TYPES = {"raw": "image/png"} | dict.fromkeys(JSON_FORMS, "application/json")


@dataclass(frozen=True)
class Measurement:
    """What wrk saw; latencies in milliseconds."""

    requests_per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    errors: int


def require_wrk() -> None:
    """Exit with the remedy when wrk is not installed."""
    if shutil.which("wrk") is None:
        raise SystemExit("error: wrk is not installed; on Debian or Ubuntu: apt-get install wrk")


def test_images() -> tuple[list[bytes], str]:
    """PNG files of IMAGES test images, and where they come from."""
    mirror = Path(os.environ["DATA_MIRROR"]) if os.environ.get("DATA_MIRROR") else None
    images, _, source = load_images(DATA, mirror)
    return [encode_png(image) for image in images[:IMAGES]], source


def wrap(image: bytes, form: str) -> bytes:
    """The body in which a server takes an image: ``raw``, or one of JSON_FORMS."""
    return image if form == "raw" else json.dumps(JSON_FORMS[form](base64.b64encode(image).decode())).encode()


def measure(
    url: str, images: list[bytes], *, form: str = "raw", connections: int, seconds: float, content_type: str = ""
) -> Measurement:
    """Send ``images`` in turn over ``connections`` open connections for ``seconds``, each as fast as answers come."""
    with tempfile.TemporaryDirectory() as folder:
        for number, image in enumerate(images):
            Path(folder, str(number)).write_bytes(wrap(image, form))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s"]
        command += ["-s", str(SCRIPT), url, "--", folder, content_type or CONTENT_TYPES[form]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 90)
    if done.returncode != 0:
        raise RuntimeError(f"wrk failed: {done.stdout}{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Measurement(
        (found["requests"] - found["errors"]) / found["seconds"],
        *(found[name] for name in ("p50_ms", "p95_ms", "p99_ms", "errors")),
    )
