"""deploy/prometheus and deploy/grafana: a real Prometheus reads a real TorchServe."""

import json
import os
import re
import shutil
import signal
import subprocess

import pytest
import yaml

from tests.conftest import HANG, ROOT, TIMEOUT
from tests.prometheus_run import FOLDER, Prometheus, find, prometheus
from tests.sent_inputs import BLANK, PNG
from tests.test_compose import VERSIONED
from tests.waiting import wait_until

GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "torchserve.json").read_text())
PANELS = {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in DASHBOARD["panels"]}
RULES = [rule for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule["expr"] for rule in RULES if "alert" in rule}
RECORDS = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
COMPOSE = yaml.safe_load((ROOT / "deploy" / "monitoring.yaml").read_text())
STRING, NAME = re.compile(r'"[^"]*"'), re.compile(r"\b[a-zA-Z_:][\w:]*")
LANGUAGE = {"sum", "by", "rate", "increase", "changes", "abs", "on", "group_left", "or", "and", "unless"}
LABELS = {"instance", "model", "job", "status", "Class", "ModelVersion", "Reason", "Stage"}
COUNTED = ("Predictions", "RejectedInputs", "UncertainPredictions")


def declared() -> set[str]:
    """The metrics of torchserve/metrics.yaml, and what Prometheus makes of a histogram."""
    parts = yaml.safe_load((ROOT / "torchserve" / "metrics.yaml").read_text())
    kinds = [
        (kind, item["name"])
        for part in ("ts_metrics", "model_metrics")
        for kind in parts[part]
        for item in parts[part][kind]
    ]
    return {name for _, name in kinds} | {
        f"{name}_{end}" for kind, name in kinds if kind == "histogram" for end in ("sum", "count")
    }


@pytest.fixture(scope="module")
def watched(server, tmp_path_factory) -> Prometheus:
    """A Prometheus that has seen good, uncertain and refused requests to ``server``, some of them since it looks."""
    target = server.metrics.removeprefix("http://")
    with prometheus(tmp_path_factory.mktemp("prometheus"), {"127.0.0.1:8082": target}) as started:
        started.wait_for('up{job="torchserve"} == 1')  # else a first look amid the requests would miss some
        for _ in range(2):
            before = {name: started.total(name) for name in COUNTED}
            for body in [PNG] * 14 + [BLANK] * 6 + [b"hello"] * 5:
                server.predict(body)
            for name, old in before.items():
                wait_until(lambda name=name, old=old: started.total(name) > old, 2 * TIMEOUT)
        yield started


def test_promtool_finds_the_configuration_and_the_rules_right():
    promtool = find("promtool")
    for command in (
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "--lint=all", "rules.yml"],
        ["test", "rules", "rules_test.yml"],
    ):
        done = subprocess.run([promtool, *command], cwd=FOLDER, capture_output=True, text=True, timeout=HANG)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_right_for_prometheus_3_too(tmp_path):
    """It leaves out what lies on a range's left boundary; a range that is a millisecond shorter does so in 2, too."""
    milliseconds = {"m": 60_000, "h": 3_600_000, "d": 86_400_000}
    rules = (FOLDER / "rules.yml").read_text()
    shorter, count = re.subn(
        r"\[(\d+)([mhd])\]", lambda found: f"[{int(found[1]) * milliseconds[found[2]] - 1}ms]", rules
    )
    assert count == rules.count("[")
    (tmp_path / "rules.yml").write_text(shorter)
    shutil.copy2(FOLDER / "rules_test.yml", tmp_path)
    command = [find("promtool"), "test", "rules", "rules_test.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_and_dashboard_ask_for_metrics_that_there_are():
    known = declared() | RECORDS.keys() | {"up", "ALERTS"}
    expressions = [*ALERTS.values(), *RECORDS.values(), *(each for panel in PANELS.values() for each in panel)]
    asked = {name for expression in expressions for name in NAME.findall(STRING.sub("", expression))}
    assert asked <= known | LANGUAGE | LABELS
    assert RECORDS.keys() <= asked, "a rule that nothing uses"


def test_every_alert_is_tested_and_explained():
    page, tests = (ROOT / "docs" / "monitoring.md").read_text(), (FOLDER / "rules_test.yml").read_text()
    assert re.findall(r"^\| `([A-Z]\w+)` \|", page, re.M) == list(ALERTS)
    for name in ALERTS:
        assert f"alertname: {name}\n        exp_alerts:\n          - " in tests, name


def test_prometheus_reads_the_server_and_every_record_has_a_value(watched):
    assert watched.wait_for('up{job="torchserve"}') == 1
    for name in RECORDS.keys() - {"instance:errors:share5m"}:  # there was none
        watched.wait_for(name)
    assert watched.wait_for("model:uncertain:share1h") == pytest.approx(0.3, abs=0.1)
    assert watched.wait_for("model:rejected:share1h") == pytest.approx(0.2, abs=0.1)
    shares = {
        sample["metric"]["Class"]: float(sample["value"][1]) for sample in watched.query("class:predictions:share1h")
    }
    assert sum(shares.values()) == pytest.approx(1)
    assert 0 < watched.wait_for("model:answer_seconds:mean5m") < TIMEOUT


@pytest.mark.parametrize("title", PANELS)
def test_every_panel_of_the_dashboard_shows_something(watched, title):
    for expression in PANELS[title]:
        watched.wait_for(expression.replace("$instance", ".*").replace("$model", ".*"))


def test_a_worker_that_is_loaded_again_shows(watched, server):
    watched.wait_for("WorkerLoadTime")
    [worker] = server.describe()["workers"]
    os.kill(worker["pid"], signal.SIGKILL)
    assert watched.wait_for("changes(WorkerLoadTime[15m]) > 0") >= 1
    wait_until(lambda: [each["status"] for each in server.describe()["workers"]] == ["READY"], 4 * TIMEOUT)


def test_the_dashboard_is_provisioned_for_the_prometheus_that_is_started():
    [source] = yaml.safe_load((GRAFANA / "datasources" / "prometheus.yaml").read_text())["datasources"]
    [provider] = yaml.safe_load((GRAFANA / "dashboards" / "provider.yaml").read_text())["providers"]
    services = COMPOSE["services"]
    assert f"--web.listen-address={source['url'].removeprefix('http://')}" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert provider["options"]["path"] == "/etc/grafana/provisioning/dashboards"
    for panel in DASHBOARD["panels"]:
        assert {panel["datasource"]["uid"], *(each["datasource"]["uid"] for each in panel["targets"])} == {
            source["uid"]
        }
    for service in services.values():
        assert VERSIONED.fullmatch(service["image"])
        assert (ROOT / "deploy" / service["volumes"][0].split(":")[0]).is_dir()
