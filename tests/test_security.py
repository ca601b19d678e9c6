"""What guards a server before it starts: settings, certificates, file modes, audit; and docs/security.md itself."""

import ast
import json
import os
import re
import ssl
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from src.serving.certificate import make_certificate
from src.serving.management import Service
from src.serving.retiring import with_valid_keys
from src.serving.settings import SettingsError, check, for_run, read_properties
from src.serving.settings import main as write_settings
from src.serving.tls import CertificateError, check_pair, name_for_clients, pin
from src.serving.tokens import TokenError, read_token
from src.serving.tokens import main as print_token
from tests.certificates import write_pair
from tests.conftest import ROOT, copy_checkout, run_script

SHIPPED = (ROOT / "torchserve" / "config.properties").read_text()
PAGE = ROOT / "docs" / "security.md"
PORTS = ["1", "2", "3"]


def settings_with(line: str, secure: bool = False) -> dict[str, str]:
    """The shipped settings with ``line`` in place of the one with its key, checked and made ready for a run."""
    key = re.match(r"\w+", line).group()
    kept = [old for old in SHIPPED.splitlines() if not old.startswith(key)]
    settings = read_properties("\n".join([*kept, line]), "the file")
    check(settings, secure, "the file")
    return for_run(settings, PORTS, {"keystore": "made.p12"} if secure else {}, container=False)


# ---- settings ----


def test_the_shipped_settings_open_nothing_but_loopback():
    settings = read_properties(SHIPPED, "the file")
    check(settings, False, "the file")
    ready = for_run(settings, PORTS, {}, container=False)
    assert ready["management_address"] == "http://127.0.0.1:2"
    assert ready["allowed_urls"] == "(?!)"
    assert ready["workflow_store"] == "/dev/null"
    assert ready["enable_model_api"] == settings["enable_model_api"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("management_address=http://0.0.0.0:8081", "management_address=http://0.0.0.0:8081, open to other machines"),
        ("management_address = http://10.1.2.3:8081", "open to other machines; write 127.0.0.1 or use --secure"),
        ("metrics_address: http://[::]:8082", "metrics_address=http://[::]:8082, open to other machines"),
        ("metrics_address=http://example.org:8082", "open to other machines"),
        ("management_address=https://127.0.0.1:8081", "write http://HOST:PORT"),
        ("inference_address=$$ADDRESS$$", "write http://HOST:PORT"),
        ("grpc_management_address=0.0.0.0", "gRPC is not used: write 127.0.0.1"),
        ("grpc_inference_address=0.0.0.0", "gRPC is not used: write 127.0.0.1"),
        ("enable_envvars_config=true", "variables named TS_... could then open the server; remove the line"),
        ("use_env_allowed_urls=true", "could then allow any URL; remove the line"),
        ("management_address http://0.0.0.0:8081", "write key=value, all on one line"),
        ("management_address=http://127.0.0.1\\", "write key=value, all on one line"),
    ],
)
def test_a_setting_that_opens_the_server_is_refused(line, said):
    with pytest.raises(SettingsError, match=re.escape(said)):
        settings_with(line)


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(SettingsError, match="sets management_address twice"):
        read_properties(SHIPPED + "management_address=http://0.0.0.0:8081\n", "the file")


def test_with_secure_management_may_be_opened_and_tokens_may_not_be_off():
    ready = settings_with("management_address=http://0.0.0.0:8081", secure=True)
    assert ready["management_address"] == "https://0.0.0.0:2"
    with pytest.raises(SettingsError, match="disable_token_authorization=true"):
        settings_with("disable_token_authorization=true", secure=True)


@pytest.mark.parametrize("key", ["allowed_urls", "workflow_store"])
def test_what_is_missing_gets_the_safe_value(key):
    kept = "\n".join(line for line in SHIPPED.splitlines() if not line.startswith(key))
    ready = for_run(read_properties(kept, "the file"), PORTS, {}, container=False)
    assert ready[key] == read_properties(SHIPPED, "the file")[key]


def test_names_are_written_as_java_reads_them():
    """As ISO-8859-1, with escapes; the rest of a file's own lines has its escapes already."""
    tls = {"certificate_file": "/etc/k\u00f6ln/a\\b \U0001f600.pem"}
    ready = for_run(read_properties(SHIPPED + r"models=https?://.*\\.mar", "the file"), PORTS, tls, container=False)
    assert ready["certificate_file"] == r"/etc/k\u00f6ln/a\\b \ud83d\ude00.pem"
    assert ready["models"] == r"https?://.*\\.mar"


# ---- certificates and tokens ----


def keytool_in(folder: Path, does: str) -> Path:
    """A Java home whose keytool does as told."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "keytool").write_text(f"#!/bin/sh\n{does}\n")
    (folder / "bin" / "keytool").chmod(0o755)
    return folder


def test_the_certificate_made_before_is_kept_until_it_is_old(tmp_path):
    (tmp_path / "made.pem").write_text("made before")
    broken = keytool_in(tmp_path / "java", "echo no entropy; exit 1")
    assert not make_certificate(tmp_path, broken)
    os.utime(tmp_path / "made.pem", (0, 0))
    with pytest.raises(CertificateError, match="bin/keytool made no certificate: no entropy"):
        make_certificate(tmp_path, broken)


def test_a_keytool_that_does_not_end_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("src.serving.certificate.TIMEOUT", 0.1)
    with pytest.raises(CertificateError, match=r"bin/keytool made no certificate in 0\.1 s; try again"):
        make_certificate(tmp_path, keytool_in(tmp_path / "java", "exec sleep 5"))


def test_a_good_pair_gives_its_names(tmp_path):
    assert check_pair(*write_pair(tmp_path, ("shop.test", "*.shop.test"))) == ["shop.test", "*.shop.test"]


@pytest.mark.parametrize(
    ("names", "host"),
    [
        (["shop.test", "localhost"], "localhost"),
        (["shop.test"], "shop.test"),
        (["*.shop.test"], "torchserve.shop.test"),
    ],
)
def test_urls_name_a_host_of_the_certificate(names, host):
    assert name_for_clients(names) == host


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"days": -1}, "is refused by clients: certificate has expired"),
        ({"elliptic": True}, "TorchServe needs an RSA key"),
        ({"password": b"secret"}, "a password protects the key"),
    ],
)
def test_a_pair_that_could_not_serve_is_refused(options, said, tmp_path):
    with pytest.raises(CertificateError, match=said):
        check_pair(*write_pair(tmp_path, **options))


def test_a_key_that_others_can_read_is_refused(tmp_path):
    certificate, key = write_pair(tmp_path)
    key.chmod(0o640)
    with pytest.raises(CertificateError, match=f"mode 640, so others can read or change it; run chmod 600 {key}"):
        check_pair(certificate, key)


def test_a_key_file_that_holds_more_than_the_key_is_refused(tmp_path):
    certificate, key = write_pair(tmp_path)
    alone = key.read_text()
    for text in (f"Bag Attributes\n    friendlyName: shop\n{alone}", certificate.read_text() + alone, alone + alone):
        key.write_text(text)
        with pytest.raises(CertificateError, match=f"{key} must hold one PEM private key and nothing else"):
            check_pair(certificate, key)


def test_the_key_of_another_certificate_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    certificate, _ = write_pair(tmp_path)
    _, key = write_pair(tmp_path / "other")
    with pytest.raises(CertificateError, match="do not load as a pair"):
        check_pair(certificate, key)


@pytest.mark.parametrize("text", ["", "-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n"])
def test_a_file_without_a_certificate_is_refused(text, tmp_path):
    (tmp_path / "broken.pem").write_text(text)
    with pytest.raises(CertificateError, match=r"broken\.pem holds (no|a damaged) certificate"):
        pin(tmp_path / "broken.pem")


def test_a_certificate_without_names_is_refused(tmp_path, capsys):
    certificate, key = write_pair(tmp_path, ())
    arguments = ["--ports", "1,2,3", "--output", tmp_path / "out", "--certificate", certificate, "--key", key]
    assert write_settings(list(map(str, arguments))) == 1
    assert "names no host (subjectAltName)" in capsys.readouterr().err


def test_clients_trust_one_certificate_only(tmp_path):
    """The first in the file: what else stands there, as the rest of a chain does, is trusted for nothing."""
    (tmp_path / "other").mkdir()
    first, second = write_pair(tmp_path), write_pair(tmp_path / "other")
    both = tmp_path / "both.pem"
    both.write_text(first[0].read_text() + second[0].read_text())
    shake_hands(pin(both), *first)
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        shake_hands(pin(both), *second)


def shake_hands(client: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """With a server that has the pair, in memory."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = client.wrap_bio(incoming, outgoing), server.wrap_bio(outgoing, incoming, server_side=True)
    for side in sides * 4:
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    assert sides[0].getpeercert()


def keys_in(folder, mode: int = 0o600) -> dict:
    """A key file as TorchServe writes it, its keys valid for an hour."""
    until = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    keys = {kind: {"key": kind[:3], "expiration time": until} for kind in ("inference", "management")}
    (folder / "key_file.json").write_text(json.dumps(keys | {"API": {"key": "api"}}))
    (folder / "key_file.json").chmod(mode)
    return keys


def test_a_token_is_read_from_a_file_that_only_its_owner_reads(tmp_path):
    with pytest.raises(TokenError, match="does not exist; start the server with"):
        read_token("inference", tmp_path)
    keys_in(tmp_path)
    assert read_token("inference", tmp_path) == "inf"
    keys_in(tmp_path, 0o644)
    with pytest.raises(TokenError, match="mode 644, so others may know the keys; start the server again"):
        read_token("inference", tmp_path)


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("https://127.0.0.1:8081", "man"),
        ("https://localhost:8081", "man"),
        ("https://shop.test:8081/", "man"),
        ("https://127.0.0.1:8091", "given"),
        ("http://127.0.0.1:8081", "given"),
    ],
)
def test_a_rollout_takes_the_servers_keys_by_whatever_name_it_is_called(address, key, tmp_path):
    keys_in(tmp_path)
    (tmp_path / "management_url").write_text("https://127.0.0.1:8081\n")
    service = Service(management=address, management_token="given")
    assert with_valid_keys(service, tmp_path).management_token == key


def test_a_key_file_that_is_being_written_is_read_again(tmp_path):
    keys = keys_in(tmp_path)
    path = tmp_path / "key_file.json"
    path.write_text(json.dumps(keys)[:40])
    writer = threading.Timer(0.2, path.write_text, [json.dumps(keys)])
    writer.start()
    assert read_token("inference", tmp_path) == "inf"
    writer.join()


@pytest.mark.parametrize("fault", ["half a key file", "no certificate"])
def test_the_token_command_ends_with_the_reason(fault, tmp_path, monkeypatch, capsys):
    keys = keys_in(tmp_path)
    (tmp_path / "management_url").write_text("https://127.0.0.1:1\n")
    (tmp_path / "broken.pem").write_text("none")
    monkeypatch.setenv("TORCHSERVE_CERTIFICATE", str(tmp_path / "broken.pem"))
    if fault == "half a key file":
        (tmp_path / "key_file.json").write_text(json.dumps(keys)[:40])
    assert print_token(["management", "--renew", "--run", str(tmp_path)]) == 1
    said = {"half a key file": "key_file.json is not whole (", "no certificate": "broken.pem holds no certificate"}
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said[fault] in error


# ---- files ----


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A checkout in which nothing is started, with an empty model store."""
    root = copy_checkout(tmp_path_factory.mktemp("copied"))
    (root / "torchserve" / "model-store").mkdir()
    return root


PLACES = [
    ".", "./run_torchserve.sh", "./export_model_for_torchserve.py", "src/preprocessing.py", "torchserve/handler.py",
    "torchserve/model-store", "models/best_model/config.json",
]  # fmt: skip


@contextmanager
def writable_by_anyone(path: Path) -> Iterator[None]:
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode | stat.S_IWOTH)
    try:
        yield
    finally:
        path.chmod(mode)


@pytest.mark.parametrize("name", PLACES)
def test_what_anyone_can_write_is_not_served(name, copied):
    with writable_by_anyone(copied / name):
        done = run_script(copied, "./run_torchserve.sh", "--native", "--secure")
    assert done.returncode == 1
    assert f"error: anyone can write to {name}; run: chmod -R o-w '{name}'\n" in done.stderr


@pytest.mark.parametrize("name", ["torchserve/.venv", "torchserve/model-store", "models/best_model"])
def test_what_anyone_can_write_behind_a_link_is_not_served(name, copied, tmp_path):
    path, before, behind = copied / name, tmp_path / "before", tmp_path / "behind"
    (behind / "lib").mkdir(parents=True)
    path.rename(before)
    path.symlink_to(behind)
    try:
        with writable_by_anyone(behind / "lib"):
            done = run_script(copied, "./run_torchserve.sh", "--native", "--secure")
    finally:
        path.unlink()
        before.rename(path)
    assert done.returncode == 1
    assert f"error: anyone can write to {name}/lib; run: chmod -R o-w '{name}/lib'\n" in done.stderr


def test_without_secure_what_anyone_can_write_brings_a_warning(copied, tmp_path):
    with writable_by_anyone(copied / "torchserve" / "handler.py"):
        done = run_script(copied, "./run_torchserve.sh", "--native", JAVA_HOME=str(tmp_path))
    assert done.stderr.startswith("warning: anyone can write to torchserve/handler.py; run: chmod -R o-w ")
    assert "\nerror: JAVA_HOME" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--certificate", "a.pem", "--key", "b.pem"], "--certificate and --key belong to --secure"),
        (["--secure", "--certificate", "a.pem"], "/a.pem and --key is "),
        (["--secure", "--certificate", "a.pem", "--key", "b.pem"], "give two PEM files that exist"),
    ],
)
def test_half_a_pair_is_refused(arguments, said, copied):
    done = run_script(copied, "./run_torchserve.sh", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert said in done.stderr


# ---- audit ----


def test_every_exception_of_the_audit_has_a_reason():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert all(len(reason) > 20 for reason in tools["audit"]["exceptions"].values())
    text = (ROOT / "pyproject.toml").read_text()
    for name in tools["bandit"]["skips"]:
        assert re.search(rf'"{name}",  # \S', text), name
    for path in ROOT.glob("src/**/*.py"):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if "# nosec" in line:
                assert re.search(r"# nosec B\d+$", line), f"{path}: {line}"
                assert lines[number - 1].strip().startswith("#"), f"{path}: the line above says no reason: {line}"


def test_ci_audits():
    assert "\nmake audit\n" in (ROOT / ".ci" / "run").read_text()
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_our_code_passes_bandit():
    command = [sys.executable, "-m", "bandit", "--quiet", "--recursive", "--configfile", "pyproject.toml", "src"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


# ---- docs/security.md ----


def test_every_claim_names_a_test_that_exists():
    """A claim is a line of a list or a table; it ends in the ids of the tests that show it."""
    tests = {
        f"{path.stem}.{node.name}"
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    claims = [line for line in PAGE.read_text().splitlines() if re.match(r"- \*\*|\| \[", line)]
    assert len(claims) > 20
    for claim in claims:
        named = re.findall(r"`(test_\w+\.test_\w+)`", claim)
        assert named, f"no test is named: {claim}"
        assert set(named) <= tests, f"no such test: {set(named) - tests}"


# ---- what the rest of docs/security.md says of the sources ----


def test_the_container_publishes_on_loopback():
    script = (ROOT / "torchserve" / "container.sh").read_text()
    published = re.findall(r'--publish "([^"]+)"', script)
    assert len(published) == 3
    assert all(address.startswith("127.0.0.1:") for address in published)


def test_weights_are_never_unpickled():
    """No file that ships to a server loads a pickle."""
    for folder in ("src/models", "src/inference", "src/export", "torchserve"):
        for path in (ROOT / folder).glob("*.py"):
            for call in re.findall(r"torch\.load\([^)]*\)", path.read_text()):
                assert "weights_only=True" in call, f"{path}: {call}"
            assert not re.search(r"pickle\.loads?\(", path.read_text()), path


def requirements_in(*names: str) -> list[Requirement]:
    lines = [line.split("#")[0] for name in names for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if re.match(r"\w", line)]


def brought_along(wanted: list[Requirement], path: list[str]) -> dict[str, str]:
    """The version of each package that is installed in ``path`` for ``wanted``, and for what these require."""
    installed = {canonicalize_name(package.name): package for package in distributions(path=path)}
    found, seen, left = {}, set(), list(wanted)
    while left:
        requirement = left.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) not in seen:
            seen.add((name, extras))
            found[name] = installed[name].version.partition("+")[0]  # without the +cpu of torch
            required = map(Requirement, installed[name].requires or [])
            left += [
                each for each in required
                if not each.marker or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras))
            ]  # fmt: skip
    return found


@pytest.mark.parametrize("environment", ["training", "server"])
def test_every_package_is_pinned(environment):
    """What somebody installed beside them is passed over: nothing of ours requires it."""
    if environment == "server":
        files, free = ["torchserve/requirements.txt"], set()
        path = list(map(str, (ROOT / "torchserve" / ".venv").glob("lib/python3*/site-packages")))
        if not path:
            pytest.skip("torchserve/.venv is not there; make serving-env makes it")
    else:
        files, free, path = ["requirements.txt", "constraints.txt"], {"pip", "setuptools"}, sys.path
    pins = {canonicalize_name(each.name): str(each.specifier) for each in requirements_in(*files)}
    wanted = {name: f"=={version}" for name, version in brought_along(requirements_in(files[0]), path).items()}
    assert len(wanted) > 20
    assert {name: version for name, version in wanted.items() if pins.get(name) != version}.keys() <= free
