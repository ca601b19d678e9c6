"""The container of deploy/kubernetes without a cluster: its command on a real TorchServe, its probes one by one."""

import shlex
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil
import pytest
import requests

from src.serving.scaling import scale, set_workers
from tests.conftest import TIMEOUT
from tests.test_container_process import PYTHON, QUICK, Container, container  # noqa: F401 (the last one is a fixture)
from tests.test_kubernetes import IMAGE_ROOT, MANAGEMENT, SERVER
from tests.waiting import is_up, stop, wait_until

OTHER = "127.0.0.2"  # reaches what listens on every interface, and not what listens on 127.0.0.1


@dataclass(frozen=True)
class Pod:
    """The image's folders, and the process of the Deployment's command."""

    image: Container
    process: subprocess.Popen

    def passes(self, probe: str) -> bool:
        """Whether a probe of the Deployment succeeds; fails at once when the server has ended."""
        assert self.process.poll() is None, self.image.log()
        if "httpGet" in SERVER[probe]:
            return is_up(f"{self.image.service().inference}{SERVER[probe]['httpGet']['path']}")
        command = [word.replace(IMAGE_ROOT, str(self.image.root)) for word in SERVER[probe]["exec"]["command"]]
        environment = self.image.environment
        done = subprocess.run(command, cwd=self.image.home, capture_output=True, timeout=TIMEOUT, env=environment)
        return done.returncode == 0


@pytest.fixture
def pod(container) -> Iterator[Pod]:  # noqa: F811
    """All of the command but tini."""
    environment, ports = container.environment, container.ports
    environment["PATH"] = f"{PYTHON.parent}:{environment['PATH']}"
    temporary, root = shlex.quote(environment["TEMP"]), shlex.quote(str(container.root))
    script = SERVER["args"][0].replace("/tmp", temporary).replace(IMAGE_ROOT, root)
    command = [*SERVER["command"][2:], script.replace(str(MANAGEMENT), str(ports[1]))]
    with (container.home / "output").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=container.home, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        yield Pod(container, process)
    finally:
        stop(process)


def test_management_answers_in_the_pod_alone(pod):
    inference, management, metrics = pod.image.ports
    wait_until(lambda: pod.passes("startupProbe"), 4 * TIMEOUT, pod.image.log)
    assert is_up(f"http://{OTHER}:{inference}/ping")
    assert is_up(f"http://{OTHER}:{metrics}/metrics")
    assert is_up(f"http://127.0.0.1:{management}/models")
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://{OTHER}:{management}/models", timeout=TIMEOUT)
    pod.process.terminate()
    assert pod.process.wait(TIMEOUT) == 0
    assert "every request that was taken is answered" in pod.image.log()


def test_the_probes_tell_busy_from_not_ready_and_from_dead(pod):
    wait_until(lambda: pod.passes("startupProbe"), 4 * TIMEOUT, pod.image.log)
    service = pod.image.service()
    worker = psutil.Process(service.describe()["workers"][0]["pid"])
    with ThreadPoolExecutor(1) as clients:
        worker.suspend()
        url = f"{service.inference}/predictions/fashion_mnist"
        asked = clients.submit(requests.post, url, data=QUICK, timeout=2 * TIMEOUT)
        wait_until(lambda: service.total("ts_inference_requests_total", model_version="default") >= 1)
        assert pod.passes("livenessProbe")
        assert pod.passes("readinessProbe"), "a worker at work is no reason to send its requests elsewhere"
        worker.kill()
        assert asked.result().status_code >= 500

    def is_back() -> bool:
        assert pod.passes("livenessProbe"), "TorchServe starts the worker again by itself"
        (found,) = service.describe()["workers"]
        return found["status"] == "READY" and found["pid"] != worker.pid

    wait_until(is_back, 4 * TIMEOUT, pod.image.log)
    assert pod.passes("readinessProbe")
    set_workers(service, "1.0", 1, 0)
    assert not pod.passes("readinessProbe")
    assert pod.passes("livenessProbe")
    scale(service, 1)
    assert pod.passes("readinessProbe")
