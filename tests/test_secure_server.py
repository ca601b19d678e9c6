"""A real server with --secure, a certificate of an operator's own, and an environment that tries to open it."""

import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import ssl
import stat
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace

import pytest
import requests

from src.serving.management import Service
from src.serving.ports import free_ports
from src.serving.retiring import curl, with_valid_keys
from src.serving.tls import pin
from tests.certificates import write_pair
from tests.conftest import TIMEOUT, copy_checkout, run_script
from tests.prometheus_run import prometheus
from tests.script_run import Run, listening, processes_of

REFUSED = {"code": 400, "type": "InvalidKeyException"}
MARK = "dont-log-me"  # in tokens and images that must not reach a log
FOREIGN = ["http://127.0.0.1:{port}/x", "https://127.0.0.1:{port}/x", "file:///etc/passwd", "ftp://127.0.0.1:{port}/x"]
LOCAL = ["fashion_mnist.mar", "../model-store/fashion_mnist.mar", "..%2F..%2Fetc%2Fpasswd", "x.war", ".", "", "%00"]


@pytest.fixture(scope="module")
def secure(tmp_path_factory) -> Iterator[Run]:
    """The server; its environment holds variables that would open it if TorchServe read them."""
    folder = tmp_path_factory.mktemp("given")
    certificate, key = write_pair(folder, ("shop.test", "*.shop.test"))
    ports = free_ports(3)
    opening = {
        "TS_MANAGEMENT_ADDRESS": f"http://0.0.0.0:{ports[1]}",
        "TS_METRICS_ADDRESS": f"http://0.0.0.0:{ports[2]}",
        "TS_ALLOWED_URLS": ".*",
        "TS_DISABLE_TOKEN_AUTHORIZATION": "true",
        "TS_CONFIG_FILE": str(folder / "other.properties"),
    }
    run = Run(copy_checkout(tmp_path_factory.mktemp("secure")), ports, os.environ | opening)
    try:
        done = run.start("--native", "--secure", "--certificate", certificate.name, "--key", str(key), cwd=folder)
        (run.root / "first_output").write_text(done.stdout + done.stderr)
        yield run
    finally:
        run.script("--stop")


def key_of(run: Run, kind: str) -> str:
    return run.keys()[kind]["key"]


def tokens(run: Run, *arguments: str):
    """``python -m src.serving.tokens`` in the server's checkout."""
    return run_script(run.root, sys.executable, "-m", "src.serving.tokens", *arguments)


# ---- TLS ----


def test_the_three_apis_speak_tls_with_the_given_certificate(secure):
    given = secure.root / "torchserve" / ".run" / "tls" / "certificate.pem"
    for port in secure.ports:
        shown = ssl.get_server_certificate(("127.0.0.1", port), timeout=TIMEOUT)
        assert shown.split() == given.read_text().split()
        assert requests.get(f"http://127.0.0.1:{port}/", timeout=TIMEOUT).status_code == 403


@pytest.mark.parametrize("copied", [False, True])
def test_prometheus_reads_the_metrics_over_tls(copied, secure, tmp_path):
    """With the certificate where it lies, and with a copy beside prometheus.yml, as a container needs it."""
    folder = secure.root / "torchserve" / ".run" / "tls"
    if copied:
        shutil.copy2(folder / "certificate.pem", tmp_path)
    place = "" if copied else f"{folder}/"
    changes = {
        "# scheme: https": "scheme: https",
        "# tls_config: {ca_file: ../../torchserve/.run/tls/": f"tls_config: {{ca_file: {place}",
        "server_name: localhost": "server_name: shop.test",
        "127.0.0.1:8082": f"127.0.0.1:{secure.ports[2]}",
    }
    with prometheus(tmp_path, changes) as watching:
        assert watching.wait_for('up{job="torchserve"} == 1') == 1


def test_old_tls_and_strangers_certificates_are_refused(secure, tmp_path):
    old = pin(secure.root / "torchserve" / ".run" / "tls" / "certificate.pem")
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    strange = pin(write_pair(tmp_path)[0])
    refused = ((old, "ALERT|VERSION|PROTOCOL"), (strange, "CERTIFICATE_VERIFY_FAILED"))
    for port, (context, said) in itertools.product(secure.ports, refused):
        with (
            socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as connection,
            pytest.raises(ssl.SSLError, match=said),
        ):
            context.wrap_socket(connection)


def test_the_printed_curl_command_works_as_printed(secure):
    output = (secure.root / "first_output").read_text()
    command = re.search(r"^Try it: +(curl .*)$", output, re.MULTILINE)[1]
    assert f"https://shop.test:{secure.ports[0]}/predictions/fashion_mnist" in command
    answer = run_script(secure.root, "bash", "-c", command.replace("curl ", "curl -sS --fail ", 1))
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["predicted_label"] == "Bag"


def test_operate_trusts_the_certificate_that_it_is_given(secure):
    url = f"https://127.0.0.1:{secure.ports[1]}"
    command = (sys.executable, "-m", "src.serving.operate", "ready", "--management", url)
    kinds = ("management", "inference")
    token = {f"TORCHSERVE_{kind.upper()}_TOKEN": key_of(secure, kind) for kind in kinds}
    trust = {"TORCHSERVE_CERTIFICATE": str(secure.root / "torchserve" / ".run" / "tls" / "certificate.pem")}
    assert "CERTIFICATE_VERIFY_FAILED" in run_script(secure.root, *command, **token).stderr
    done = run_script(secure.root, *command, **token, **trust)
    assert done.stdout == "fashion_mnist is ready: 1 worker\n", done.stderr
    addresses = (f"--{api}=https://127.0.0.1:{port}" for api, port in zip(kinds[::-1], secure.ports, strict=False))
    options = (f"--{kind}-token={key_of(secure, kind)}" for kind in kinds)
    send = ("send", "torchserve/sample_input.json", *addresses, *options)
    sent = run_script(secure.root, *command[:3], *send, **trust)
    assert json.loads(sent.stdout)["predicted_label"] == "Trouser", sent.stderr


def test_the_load_test_trusts_that_certificate_alone(secure, tmp_path):
    kinds = ("inference", "management")
    addresses = (f"--{api}=https://127.0.0.1:{port}" for api, port in zip(kinds, secure.ports, strict=False))
    keys = (f"--{kind}-token={key_of(secure, kind)}" for kind in kinds)
    options = ("--rate=10", "--duration=2", "--data=none", f"--output={tmp_path}")
    command = (sys.executable, "-m", "src.serving.load_test", *addresses, *keys, *options)
    ours = str(secure.root / "torchserve" / ".run" / "tls" / "certificate.pem")
    done = run_script(secure.root, *command, TORCHSERVE_CERTIFICATE=ours, DATA_MIRROR="")
    assert "failures" in done.stdout, done.stderr
    assert json.loads((tmp_path / "load_test.json").read_text())["figures"]["failures"] == 0, done.stdout
    # Asked with another certificate, the server is not sent a token: no request gets so far.
    code = f"""
import itertools
from src.serving.load_requests import Shot
from src.serving.load_users import run_users
shots = itertools.repeat(Shot("raw", b"x", "image/png"))
answers, _ = run_users("https://127.0.0.1:{secure.ports[0]}/ping", shots, 10, 1, "token", None)
assert answers and {{answer.fault for answer in answers}} == {{"no answer"}}, answers
"""
    (tmp_path / "other").mkdir()
    other, _ = write_pair(tmp_path / "other")
    assert run_script(secure.root, sys.executable, "-c", code, TORCHSERVE_CERTIFICATE=str(other)).returncode == 0


# ---- tokens ----


@pytest.mark.parametrize("kind", ["missing", "wrong", "of the other API"])
def test_nothing_is_answered_without_the_right_token(kind, secure):
    keys = {"missing": ("", ""), "wrong": (MARK, MARK)}
    inference, management = keys.get(kind, (key_of(secure, "management"), key_of(secure, "inference")))
    calls = [(0, "POST", "/predictions/fashion_mnist"), (0, "GET", "/ping"), (0, "POST", "/wfpredict/x")]
    calls += [(1, "GET", "/models"), (1, "POST", "/models?url=x.mar"), (1, "DELETE", "/models/fashion_mnist")]
    calls += [(1, "GET", "/workflows"), (1, "POST", "/workflows?url=x.war"), (1, "GET", "/token?type=management")]
    for api, method, path in calls:
        refused = secure.request(method, secure.ports[api], path, (inference, management)[api])
        assert refused.status_code == 400, path
        assert refused.json().items() >= REFUSED.items(), path


def test_a_token_is_renewed_and_the_old_one_refused(secure):
    before = key_of(secure, "inference")
    assert tokens(secure, "inference").stdout == f"Authorization: Bearer {before}\n"
    done = tokens(secure, "inference", "--renew")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Authorization: Bearer {key_of(secure, 'inference')}\n"
    assert secure.predict(before).json().items() >= REFUSED.items()
    assert secure.predict(key_of(secure, "inference")).status_code == 200


def test_keys_that_expire_while_a_version_is_watched_are_renewed(secure):
    run = secure.root / "torchserve" / ".run"
    before = key_of(secure, "management")
    given = service_of(secure)
    assert with_valid_keys(given, run) == given
    keys = secure.keys()
    for kind in ("management", "inference"):
        keys[kind]["expiration time"] = "2020-01-01T00:00:00.123456789Z"
    (run / "key_file.json").write_text(json.dumps(keys))
    code = f"""
from pathlib import Path
from src.serving.management import Service
from src.serving.retiring import with_valid_keys
found = with_valid_keys({given!r}, Path("torchserve/.run"))
print(found.management_token, found.inference_token, found.describe()["modelVersion"])
"""
    done = run_script(secure.root, sys.executable, "-c", code)
    assert done.stdout == f"{key_of(secure, 'management')} {key_of(secure, 'inference')} 1.0\n", done.stderr
    assert key_of(secure, "management") != before  # TorchServe knew the other one to be valid and wrote that, too
    elsewhere = replace(given, management="https://127.0.0.1:1")
    assert with_valid_keys(elsewhere, run) is elsewhere


def test_keys_that_expire_in_the_middle_of_a_turn_are_renewed(secure):
    """A second after the watch has begun the file says that the keys have expired."""
    before = key_of(secure, "management")
    code = f"""
import json, threading
from pathlib import Path
from src.serving.golden import load_golden
from src.serving.management import Service
from src.serving.shares import Shares
from src.serving.watching import Trial
run = Path("torchserve/.run")
def expire():
    keys = json.loads((run / "key_file.json").read_text())
    for kind in ("management", "inference"):
        keys[kind]["expiration time"] = "2020-01-01T00:00:00.123456789Z"
    (run / "key_file.json").write_text(json.dumps(keys))
threading.Timer(1, expire).start()
trial = Trial({service_of(secure)!r}, run, load_golden(Path("torchserve/golden")), "0.9", "1.0", print)
trial.observe(1.0, 4, Shares(0, 0, 0))
"""
    certificate = "torchserve/.run/tls/certificate.pem"
    done = run_script(secure.root, sys.executable, "-c", code, TORCHSERVE_CERTIFICATE=certificate)
    assert done.returncode == 0, done.stderr
    assert "version 1.0: " in done.stdout
    assert key_of(secure, "management") != before


def test_keys_that_expire_before_a_version_is_judged_are_renewed(secure):
    before, keys = key_of(secure, "management"), secure.keys()
    given = service_of(secure)
    for kind in ("management", "inference"):
        keys[kind]["expiration time"] = "2020-01-01T00:00:00.123456789Z"
    (secure.root / "torchserve" / ".run" / "key_file.json").write_text(json.dumps(keys))
    code = f"""
from pathlib import Path
from src.serving.golden import load_golden
from src.serving.management import Service
from src.serving.rollout import judge
judge({given!r}, Path("torchserve/.run"), load_golden(Path("torchserve/golden"))[:1], "1.0", "1.0", print)
"""
    done = run_script(secure.root, sys.executable, "-c", code)
    assert "golden set: 1 of 1 right" in done.stdout, done.stderr
    assert key_of(secure, "management") != before


def test_the_command_that_a_rollout_prints_works_as_printed(secure, tmp_path, monkeypatch):
    """The version does not exist; that is said to one whom the server trusts, and who trusts the server."""
    monkeypatch.setenv("TORCHSERVE_CERTIFICATE", "torchserve/.run/tls/certificate.pem")
    named = replace(service_of(secure), management=f"https://shop.test:{secure.ports[1]}")
    (tmp_path / ".curlrc").write_text(f"resolve = shop.test:{secure.ports[1]}:127.0.0.1\n")
    done = run_script(secure.root, "bash", "-c", curl(named, "DELETE", "9.9"), CURL_HOME=str(tmp_path))
    assert json.loads(done.stdout)["type"] == "ModelVersionNotFoundException", done.stdout + done.stderr


def service_of(run: Run) -> Service:
    inference, management, metrics = (f"https://127.0.0.1:{port}" for port in run.ports)
    keys = (key_of(run, kind) for kind in ("management", "inference"))
    return Service("fashion_mnist", inference, management, metrics, *keys)


# ---- what management may do, to one who has its token ----


def test_no_workflow_can_be_registered(secure):
    """Neither from a URL, nor from the model store, nor with a token; and the inference API knows no workflow."""
    token = key_of(secure, "management")
    for url in [*(name.format(port=secure.ports[1]) for name in FOREIGN), *LOCAL]:
        for body in (None, {"url": url}):
            query = "" if body else f"?url={url}"
            answer = secure.request("POST", secure.ports[1], f"/workflows{query}", token, json=body)
            assert answer.status_code in (403, 404), url
    assert secure.get("/workflows", token).json() == {"workflows": []}
    for path in ("/wfpredict/x", "/workflows?url=x.war", "/models?url=fashion_mnist.mar", "/token?type=inference"):
        for method, kind in itertools.product(("GET", "POST"), ("inference", "management", "API")):
            answer = secure.request(method, secure.ports[0], path, key_of(secure, kind))
            assert answer.status_code == (404 if kind == "inference" else 400), (method, path, kind)


def test_no_model_is_fetched_from_a_url_or_from_outside_the_store(secure):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        token = key_of(secure, "management")
        for name in [url.format(port=listener.getsockname()[1]) for url in FOREIGN] + [
            "../x.mar",
            "/etc/passwd",
            "%2e%2e%2fx",
        ]:
            answer = secure.request("POST", secure.ports[1], f"/models?url={name}", token)
            assert answer.status_code in (400, 404), name
        with pytest.raises(BlockingIOError):
            listener.accept()  # nobody connected
    assert [model["modelName"] for model in secure.get("/models", token).json()["models"]] == ["fashion_mnist"]


def register(run: Run, entries: dict[str, str]) -> int:
    """Put an archive with ``entries`` into the model store, register it, take it away; return the status."""
    manifest = {"model": {"modelName": "evil", "handler": "h.py", "modelVersion": "1.0", "configFile": "config.yaml"}}
    path = run.root / "torchserve" / "model-store" / "evil.mar"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest | {"runtime": "python", "archiverVersion": "1"}))
        for name, text in entries.items():
            archive.writestr(name, text)
    try:
        return run.request(
            "POST", run.ports[1], "/models?url=evil.mar&initial_workers=0", key_of(run, "management")
        ).status_code
    finally:
        path.unlink()


def test_an_archive_cannot_write_outside_its_folder(secure, tmp_path):
    """Which is refused for that alone: without the one entry it is taken."""
    token, entries = key_of(secure, "management"), {"h.py": "", "config.yaml": "minWorkers: 1\n"}
    assert register(secure, entries) == 200
    assert secure.request("DELETE", secure.ports[1], "/models/evil", token).status_code == 200
    assert register(secure, entries | {"../" * 30 + f".{tmp_path}/slipped": "x"}) >= 400
    assert list(tmp_path.iterdir()) == []


def test_an_archives_yaml_builds_no_java_object(secure):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        classes = f'[!!java.net.URL ["http://127.0.0.1:{listener.getsockname()[1]}/"]]'
        yaml = f"minWorkers: 0\nx: !!javax.script.ScriptEngineManager [!!java.net.URLClassLoader [{classes}]]\n"
        register(secure, {"h.py": "", "config.yaml": yaml})
        log = (secure.root / "torchserve" / ".run" / "logs" / "torchserve.log").read_text()
        assert "Global tag is not allowed: tag:yaml.org,2002:javax.script.ScriptEngineManager" in log
        with pytest.raises(BlockingIOError):
            listener.accept()  # the gadget of CVE-2022-1471 would have loaded classes from here


def test_the_bill_of_materials_holds_the_packages_and_the_archive(secure):
    done = run_script(secure.root, sys.executable, "scripts/write_sbom.py")
    assert done.returncode == 0, done.stderr
    document = json.loads((secure.root / "sbom.json").read_text())
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    found = {component["name"]: component for component in document["components"]}
    for line in (secure.root / "torchserve" / "requirements.txt").read_text().splitlines():
        if pinned := re.match(r"([\w.-]+)==(\S+)", line):
            names = {name.lower().replace("_", "-"): item for name, item in found.items()}
            assert names[pinned[1].lower().replace("_", "-")]["version"].startswith(pinned[2])
    archive = secure.root / "torchserve" / "model-store" / "fashion_mnist.mar"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert found["fashion_mnist.mar"]["hashes"] == [{"alg": "SHA-256", "content": digest}]
    assert found["ts/frontend/model-server.jar"]["hashes"]
    assert found["netty-codec-http"]["purl"] == "pkg:maven/io.netty/netty-codec-http@4.1.53.Final"


# ---- what the machine's other users and the network see ----


def test_everything_listens_on_loopback_whatever_the_environment_says(secure):
    """The three APIs and the two of gRPC, which TorchServe cannot turn off; the workers have no port."""
    addresses = listening(secure.root)
    assert {address.ip.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}
    assert {address.port for address in addresses} >= set(secure.ports)
    assert len(addresses) == 5


def test_only_the_owner_reads_keys_settings_and_sockets(secure):
    folder = secure.root / "torchserve" / ".run"
    for path in (folder, folder / "tls"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in (folder / "key_file.json", folder / "config.properties", folder / "tls" / "certificate.pem"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    temporary = (folder / "tmp").resolve()
    # Of a long path it is a link to a folder of its own.
    assert 0o700 in {stat.S_IMODE(path.stat().st_mode) for path in (temporary, temporary.parent)}
    sockets = list(temporary.glob(".ts.sock.*"))
    assert sockets
    for path in sockets:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def test_no_token_and_no_image_reaches_a_log_or_a_command_line(secure):
    good = [key["key"] for key in secure.keys().values()]
    inference = key_of(secure, "inference")
    for key in (inference, MARK):
        secure.predict(key, f"{MARK} raw".encode())
        secure.predict(key, json.dumps({"image": f"{MARK} base64"}).encode())
        secure.predict(key, b"{broken " + MARK.encode(), headers={"X-Shop": f"{MARK} header"})
        secure.predict(key, b"", files={"data": (f"{MARK}.png", f"{MARK} form".encode())})
        secure.get("/models", key)
        secure.get("/token?type=inference", key)
    time.sleep(1)  # the log is written behind the answer
    folder = secure.root / "torchserve" / ".run"
    seen = {str(path): path.read_text(errors="replace") for path in (folder / "logs").rglob("*") if path.is_file()}
    assert len(seen) >= 2
    seen |= {"output": (secure.root / "first_output").read_text()}
    seen |= {f"process {process.pid}": " ".join(process.cmdline()) for process in processes_of(secure.root)}
    for where, text in seen.items():
        assert MARK not in text, where
        assert not any(key in text for key in good), where
