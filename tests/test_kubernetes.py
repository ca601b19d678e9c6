"""deploy/kubernetes: Kubernetes' schemas, and what these cannot know. test_kubernetes_pod.py runs the pod's command."""

import json
import os
import re
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml

from src.serving.settings import read_properties
from tests.conftest import ROOT, TIMEOUT
from tests.test_compose import dockerfile_words

FOLDER = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.30", kubernetes_validate.latest_version())  # 1.30 is the first that knows the handler sleep
KUSTOMIZATION, *PARTS = (yaml.safe_load((FOLDER / name).read_text()) for name in (
    "kustomization.yaml", "namespace.yaml", "deployment.yaml", "service.yaml", "hpa.yaml", "disruption.yaml",
    "networkpolicy.yaml",
))  # fmt: skip
NAMESPACE, DEPLOYMENT, SERVICE, HPA, DISRUPTION, POLICY = PARTS
KSERVE = yaml.safe_load((FOLDER / "kserve.yaml").read_text())
TEMPLATE, PREDICTOR = DEPLOYMENT["spec"]["template"], KSERVE["spec"]["predictor"]
POD = TEMPLATE["spec"]
(SERVER,) = POD["containers"]
DOCKERFILE = (ROOT / "torchserve" / "Dockerfile").read_text()
IMAGE_ROOT, IMAGE_HOME = "/opt/model-server", dockerfile_words(DOCKERFILE, "WORKDIR")[0]
SETTINGS = read_properties((ROOT / "torchserve" / "config.properties").read_text(), "config.properties")
INFERENCE, MANAGEMENT, METRICS = (
    int(SETTINGS[f"{api}_address"].rpartition(":")[2]) for api in ("inference", "management", "metrics")
)
KSERVE_KEYS = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "deploymentStrategy", "annotations"}


def without_name(server: dict) -> dict:
    """A container, without what KServe names otherwise."""
    return {key: value for key, value in server.items() if key not in {"name", "ports"}}


def test_every_file_is_applied():
    """And kserve.yaml alone stands beside them."""
    assert {*KUSTOMIZATION["resources"], "kustomization.yaml", "kserve.yaml"} == {
        path.name for path in FOLDER.iterdir()
    }


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part["kind"])
def test_kubernetes_knows_every_key(part, version):
    kubernetes_validate.validate(part, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_predictor_of_kserve_is_the_same_pod(version):
    pod = {key: value for key, value in PREDICTOR.items() if key not in KSERVE_KEYS}
    kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", "spec": pod}, version, strict=True)
    (server,) = pod.pop("containers")
    assert server["name"] == "kserve-container"
    assert server["ports"] == SERVER["ports"][:1], "KServe puts every port of the container into its Service"
    assert without_name(server) == without_name(SERVER)
    assert pod == {key: value for key, value in POD.items() if key not in {"containers", "topologySpreadConstraints"}}
    assert PREDICTOR["annotations"] == TEMPLATE["metadata"]["annotations"]
    assert PREDICTOR["deploymentStrategy"]["rollingUpdate"] == DEPLOYMENT["spec"]["strategy"]["rollingUpdate"]
    assert (PREDICTOR["minReplicas"], PREDICTOR["maxReplicas"]) == (
        HPA["spec"]["minReplicas"],
        HPA["spec"]["maxReplicas"],
    )
    target = HPA["spec"]["metrics"][0]["resource"]
    assert (PREDICTOR["scaleMetric"], PREDICTOR["scaleTarget"]) == (
        target["name"],
        target["target"]["averageUtilization"],
    )


def test_kubectl_renders_what_is_written(tmp_path):
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    folder = shutil.copytree(FOLDER, tmp_path / "kubernetes")
    made = (folder / "kustomization.yaml").read_text().replace("newTag: v1 ", "newTag: v2 ")
    (folder / "kustomization.yaml").write_text(made)
    command = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    rendered = {part["kind"]: part for part in yaml.safe_load_all(done.stdout)}
    assert rendered["Deployment"]["spec"]["template"]["spec"]["containers"][0]["image"] == "mymodel-serve:v2"
    rendered["Deployment"]["spec"]["template"]["spec"]["containers"][0]["image"] = SERVER["image"]
    for part in PARTS:
        if part is not NAMESPACE:
            part = part | {"metadata": part["metadata"] | {"namespace": NAMESPACE["metadata"]["name"]}}
        assert rendered.pop(part["kind"]) == part
    assert not rendered


def test_the_parts_find_each_other():
    labels = TEMPLATE["metadata"]["labels"]
    spreads = [spread["labelSelector"]["matchLabels"] for spread in POD["topologySpreadConstraints"]]
    selectors = [DEPLOYMENT["spec"]["selector"]["matchLabels"], DISRUPTION["spec"]["selector"]["matchLabels"]]
    for selector in [*selectors, *spreads, SERVICE["spec"]["selector"]]:
        assert selector.items() <= labels.items()
    target = HPA["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": DEPLOYMENT["apiVersion"],
        "kind": "Deployment",
        "name": DEPLOYMENT["metadata"]["name"],
    }
    assert "replicas" not in DEPLOYMENT["spec"], "an apply would undo what the autoscaler did"
    assert DISRUPTION["spec"]["maxUnavailable"] < HPA["spec"]["minReplicas"] < HPA["spec"]["maxReplicas"]
    assert {volume["name"] for volume in POD["volumes"]} == {mount["name"] for mount in SERVER["volumeMounts"]}
    (image,) = KUSTOMIZATION["images"]
    assert SERVER["image"] == f"{image['newName']}:{image['newTag']}" == f"{image['name']}:v1"
    assert KUSTOMIZATION["namespace"] == NAMESPACE["metadata"]["name"]


def test_ports_are_the_servers_and_management_is_open_to_nobody():
    assert [str(port) for port in (INFERENCE, MANAGEMENT, METRICS)] == dockerfile_words(DOCKERFILE, "EXPOSE")
    assert {port["name"]: port["containerPort"] for port in SERVER["ports"]} == {
        "inference": INFERENCE,
        "metrics": METRICS,
    }
    assert [(port["port"], port["targetPort"]) for port in SERVICE["spec"]["ports"]] == [(INFERENCE, "inference")]
    assert TEMPLATE["metadata"]["annotations"]["prometheus.io/port"] == str(METRICS)
    rules = {rule["ports"][0]["port"]: rule for rule in POLICY["spec"]["ingress"]}
    assert rules.keys() == {INFERENCE, METRICS}
    for rule in rules.values():
        assert len(rule["ports"]) == len(rule["from"]) == 1
        assert rule["from"][0]["namespaceSelector"]["matchLabels"], "an empty selector is every namespace"
    assert POLICY["spec"]["podSelector"] == {}
    assert POLICY["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in POLICY["spec"]


def test_the_pod_runs_what_the_image_runs_and_asks_what_its_health_check_asks():
    script = SERVER["args"][0]
    entry = json.loads(re.search(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE, re.M)[1])
    arguments = json.loads(re.search(r"^CMD (\[.*\])$", DOCKERFILE, re.M)[1])
    assert SERVER["command"][:2] == entry[:2]
    assert script.endswith(f"exec {' '.join(entry[2:])} --ts-config /tmp/config.properties {' '.join(arguments)}")
    check = json.loads(re.search(r"^HEALTHCHECK.*?CMD (\[.*?\])$", DOCKERFILE, re.M | re.S)[1])
    copied = re.search(r"^WORKDIR (\S+)\nCOPY (.*) \./$", DOCKERFILE, re.M)
    assert copied[1] == IMAGE_ROOT
    assert {"entrypoint.py", "healthcheck.py", "config.properties"} <= set(copied[2].split())
    for probe in ("readinessProbe", "startupProbe"):
        assert SERVER[probe]["exec"]["command"] == check
    startup = SERVER["startupProbe"]
    limits = yaml.safe_load((ROOT / "torchserve" / "model-config.yaml").read_text())
    assert startup["periodSeconds"] * startup["failureThreshold"] > limits["startupTimeout"]
    liveness = SERVER["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > limits["responseTimeout"]


def test_a_pod_that_goes_has_time_to_answer():
    (drain,) = (entry["value"] for entry in SERVER["env"] if entry["name"] == "DRAIN_SECONDS")
    assert POD["terminationGracePeriodSeconds"] > SERVER["lifecycle"]["preStop"]["sleep"]["seconds"] + int(drain)
    assert DEPLOYMENT["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_the_pod_may_do_little():
    """What the level that namespace.yaml asks for wants, and more."""
    assert NAMESPACE["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    who = POD["securityContext"]
    assert [str(who["runAsUser"])] == dockerfile_words(DOCKERFILE, "USER")
    assert who["runAsNonRoot"]
    assert who["seccompProfile"] == {"type": "RuntimeDefault"}
    assert POD["automountServiceAccountToken"] is False
    limits = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert SERVER["securityContext"] == limits
    written = re.findall(r"--tmpfs ([^:\s]+)", (ROOT / "torchserve" / "container.sh").read_text())
    assert [mount["mountPath"] for mount in SERVER["volumeMounts"]] == written == ["/tmp", IMAGE_HOME]
