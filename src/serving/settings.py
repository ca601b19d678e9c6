"""The TorchServe settings of one run: ``python -m src.serving.settings --ports 8080,8081,8082 --output FILE``.

Reads torchserve/config.properties, refuses what would open the server by accident, puts in ports and TLS, and prints
the host for URLs. Java takes the last of several values and lets variables TS_... win if it is told to; what is
written here has one value for each key. Needs only the standard library.
"""

import argparse
import ipaddress
import json
import os
import re
import sys
from pathlib import Path

from src.serving.tls import CertificateError, check_pair, name_for_clients

SOURCE = Path("torchserve/config.properties")
APIS = ("inference", "management", "metrics")
ADDRESS = re.compile(r"http://(\[[0-9A-Fa-f:.]+\]|[\w.-]+):\d+")
# TorchServe's own defaults allow every URL, and take the model store for the store of workflows.
SAFE = {"allowed_urls": "(?!)", "workflow_store": os.devnull}
FORBIDDEN = {
    "enable_envvars_config": "variables named TS_... could then open the server",
    "use_env_allowed_urls": "a variable could then allow any URL",
}
CONTAINER = Path("/opt/model-server")
# For a container alone: there what is published decides.
EVERY_INTERFACE = "0.0.0.0"  # noqa: S104  # nosec B104


class SettingsError(ValueError):
    """A setting that must not be served with; the message names it and the remedy."""


def read_properties(text: str, name: str) -> dict[str, str]:
    """The settings in a .properties file, ``key=value`` a line, with their escapes. Raises SettingsError."""
    found: dict[str, str] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line[0] in "#!":
            continue
        parts = re.fullmatch(r"(\w+)\s*[=:]\s*(.*[^\\]|)", line)
        if not parts:
            raise SettingsError(f"{name}, line {number} is {line!r}; write key=value, all on one line")
        if parts[1] in found:
            raise SettingsError(f"{name} sets {parts[1]} twice; remove one of the two")
        found[parts[1]] = parts[2]
    return found


def for_java(value: object) -> str:
    """A value as a .properties file must hold it, which Java reads as ISO-8859-1 with escapes: those of JSON."""
    return json.dumps(str(value))[1:-1]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check(settings: dict[str, str], secure: bool, name: str) -> None:
    """Raise SettingsError for a setting that opens the server further than asked for."""
    for key, reason in FORBIDDEN.items():
        if settings.get(key, "false").lower() != "false":
            raise SettingsError(f"{name} has {key}={settings[key]}: {reason}; remove the line")
    for api in APIS:
        key, value = f"{api}_address", settings.get(f"{api}_address", "")
        parts = ADDRESS.fullmatch(value)
        if not parts:
            raise SettingsError(f"{name} has {key}={value}; write http://HOST:PORT (--secure makes it https)")
        if api != "inference" and not secure and not is_loopback(parts[1]):
            raise SettingsError(f"{name} has {key}={value}, open to other machines; write 127.0.0.1 or use --secure")
    for key in ("grpc_inference_address", "grpc_management_address"):
        if not is_loopback(settings.get(key, "127.0.0.1")):
            raise SettingsError(f"{name} has {key}={settings[key]}; gRPC is not used: write 127.0.0.1")
    if secure and settings.get("disable_token_authorization", "false").lower() != "false":
        raise SettingsError(
            f"{name} has disable_token_authorization=true, and --secure asks for tokens; remove the line"
        )


def for_run(settings: dict[str, str], ports: list[str], tls: dict[str, str], container: bool) -> dict[str, str]:
    """The settings with this run's ports, gRPC on any free loopback port, and TLS where ``tls`` is not empty."""
    ready = SAFE | settings | {key: for_java(value) for key, value in tls.items()}
    for api, port in zip(APIS, ports, strict=True):
        host = EVERY_INTERFACE if container else ADDRESS.fullmatch(settings[f"{api}_address"])[1]
        ready[f"{api}_address"] = f"http{'s' if tls else ''}://{host}:{port}"
    folder = CONTAINER if container else SOURCE.parent.absolute()
    return ready | {
        "grpc_inference_port": "0", "grpc_management_port": "0", "metrics_config": for_java(folder / "metrics.yaml"),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ports", required=True, help="three, in the order inference, management, metrics")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--container", action="store_true", help="for the image, where what is published decides")
    parser.add_argument("--certificate", type=Path, help="PEM; --secure with a given certificate")
    parser.add_argument("--key", type=Path, help="PEM; the certificate's")
    parser.add_argument("--keystore", type=Path, help="PKCS12; --secure with a certificate that was made")
    parser.add_argument("--password", type=Path, help="the file with the keystore's password")
    arguments = parser.parse_args(argv)
    tls, host = {}, "127.0.0.1"
    folder = CONTAINER / "tls" if arguments.container else None  # where run_torchserve.sh mounts them
    try:
        if arguments.certificate:
            host = name_for_clients(check_pair(arguments.certificate, arguments.key))
            tls = {"certificate_file": arguments.certificate, "private_key_file": arguments.key}
        elif arguments.keystore:
            tls = {"keystore": arguments.keystore}
        tls = {key: str(folder / path.name if folder else path.absolute()) for key, path in tls.items()}
        if arguments.keystore:
            tls["keystore_pass"] = arguments.password.read_text().strip()
        settings = read_properties(SOURCE.read_text(), str(SOURCE))
        check(settings, bool(tls), str(SOURCE))
    except (SettingsError, CertificateError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    ready = for_run(settings, arguments.ports.split(","), tls, arguments.container)
    with open(os.open(arguments.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.writelines(f"{key}={value}\n" for key, value in ready.items())
    print(host)
    return 0


if __name__ == "__main__":
    sys.exit(main())
