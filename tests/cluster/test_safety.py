"""What the threat table of cluster/README.md promises, in the manifests and in the code."""

from __future__ import annotations

import ast
import copy
import io
import os
import pickle
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ultralong_ray.types import UserError

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = sorted(folder.name for folder in (ROOT / "cluster" / "overlays").iterdir())
KUBERNETES = "1.32"
KUBERNETES_OWN = {
    "v1",
    "apps/v1",
    "batch/v1",
    "policy/v1",
    "networking.k8s.io/v1",
    "rbac.authorization.k8s.io/v1",
    "scheduling.k8s.io/v1",
}

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which builds kustomize folders")
Documents = list[dict[str, Any]]


def built(overlay: str) -> Documents:
    folder = str(ROOT / "cluster" / "overlays" / overlay)
    text = subprocess.run(["kubectl", "kustomize", folder], check=True, capture_output=True, text=True).stdout
    return list(yaml.load_all(text, Loader=yaml.CSafeLoader))


def pods(documents: Documents) -> list[tuple[str, dict[str, Any]]]:
    """(name, pod spec) of all that the manifests start."""
    found = []
    for document in documents:
        spec = document.get("spec", {})
        name = document["metadata"]["name"]
        for cluster in (
            [spec]
            if document["kind"] == "RayCluster"
            else [spec["rayClusterSpec"]]
            if document["kind"] == "RayJob"
            else []
        ):
            found.append((f"{name}/head", cluster["headGroupSpec"]["template"]["spec"]))
            found += [(f"{name}/{g['groupName']}", g["template"]["spec"]) for g in cluster["workerGroupSpecs"]]
        if document["kind"] == "StatefulSet":
            found.append((name, spec["template"]["spec"]))
    return found


def pod_faults(documents: Documents) -> set[str]:
    """What a pod may not have, `pod: fault`."""
    found = set()
    for name, pod in pods(documents):
        if not pod["securityContext"].get("runAsNonRoot"):
            found.add(f"{name}: may run as root")
        found |= {f"{name}: {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)}
        found |= {f"{name}: a folder of the node" for volume in pod.get("volumes", []) if "hostPath" in volume}
        if not name.endswith("/head") and pod.get("automountServiceAccountToken") is not False:
            found.add(f"{name}: an account of Kubernetes")
        for container in pod["containers"] + pod.get("initContainers", []):
            allowed = container.get("securityContext", {})
            if allowed.get("allowPrivilegeEscalation") is not False or allowed.get("privileged"):
                found.add(f"{name}: privileges")
            if not allowed.get("readOnlyRootFilesystem"):
                found.add(f"{name}: a root file system that can be written")
            if allowed.get("capabilities", {}).get("drop") != ["ALL"] or set(allowed["capabilities"].get("add", [])) - {
                "IPC_LOCK"
            }:
                found.add(f"{name}: capabilities")
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            found |= {
                f"{name}: {key} without a limit" for key in requests if key not in limits and key != "ephemeral-storage"
            }
    return found


def network_faults(documents: Documents) -> set[str]:
    found = {f"{d['kind']} {d['metadata']['name']}" for d in documents if d["kind"] == "Ingress"}
    found |= {
        f"Service {d['metadata']['name']}"
        for d in documents
        if d["kind"] == "Service" and d["spec"].get("type", "ClusterIP") != "ClusterIP"
    }
    for document in documents:
        spec = document.get("spec", {}).get("rayClusterSpec", document.get("spec", {}))
        head = spec.get("headGroupSpec") if document["kind"] in ("RayCluster", "RayJob") else None
        if head is not None and head.get("serviceType") != "ClusterIP":
            found.add("a head that can be reached from outside")
        if head is not None and spec.get("authOptions") != {"mode": "token"}:
            found.add("no token is asked for")
    policies = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]
    selected = [policy["podSelector"].get("matchLabels") for policy in policies]
    if {"app.kubernetes.io/name": "ultralong-ray"} not in selected:
        found.add("Ray's pods have no network policy")
    for policy in policies:
        if set(policy["policyTypes"]) != {"Ingress", "Egress"}:
            found.add("a policy of one direction")
        found |= {"anybody may come in" for rule in policy["ingress"] if not rule.get("from")}
        found |= {"anything may go out" for rule in policy["egress"] if not rule.get("to") and not rule.get("ports")}
    return found


def schema_faults(documents: Documents) -> list[str]:
    """Against the strict schemas of Kubernetes' own kinds."""
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate, of the dev extra")
    found = []
    for document in documents:
        if document["apiVersion"] in KUBERNETES_OWN:
            try:
                validate.validate(document, KUBERNETES, strict=True)
            except validate.ValidationError as error:
                found.append(f"{document['kind']} {document['metadata']['name']}: {error.message}")
    return found


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_is_safe_and_kubernetes_knows_all_of_it(overlay: str) -> None:
    documents = built(overlay)
    assert pod_faults(documents) == set() and network_faults(documents) == set()
    assert schema_faults(documents) == []


@needs_kubectl
def test_planted_faults_are_found() -> None:
    documents = built("gpu-generic-guarded")
    broken = copy.deepcopy(documents)
    name, pod = next(found for found in pods(broken) if found[0].endswith("/train"))
    pod["hostNetwork"] = True
    pod["volumes"].append({"name": "node", "hostPath": {"path": "/"}})
    del pod["automountServiceAccountToken"]
    container = pod["containers"][0]
    container["securityContext"] = {"privileged": True, "capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}
    del container["resources"]["limits"]["nvidia.com/gpu"]
    faults = {fault.removeprefix(f"{name}: ") for fault in pod_faults(broken)}
    assert faults == {
        "hostNetwork",
        "a folder of the node",
        "an account of Kubernetes",
        "privileges",
        "a root file system that can be written",
        "capabilities",
        "nvidia.com/gpu without a limit",
    }
    broken = copy.deepcopy(documents)
    policy = next(d for d in broken if d["kind"] == "NetworkPolicy" and d["metadata"]["name"] == "ultralong-ray")
    policy["spec"]["ingress"].append({"ports": [{"port": 8265}]})
    cluster = next(d for d in broken if d["kind"] == "RayCluster")
    cluster["spec"]["headGroupSpec"]["serviceType"] = "LoadBalancer"
    del cluster["spec"]["authOptions"]
    assert network_faults(broken) == {
        "anybody may come in",
        "a head that can be reached from outside",
        "no token is asked for",
    }


@needs_kubectl
@pytest.mark.parametrize(
    ("kind", "path", "field"),
    [
        ("NetworkPolicy", ["spec"], "podSelectors"),
        ("PodDisruptionBudget", ["spec"], "maxUnavailabel"),
        ("Role", ["rules", 0], "verb"),
        ("StatefulSet", ["spec", "template", "spec", "containers", 0], "imagePullPolice"),
    ],
)
def test_a_misspelt_field_is_found(kind: str, path: list[Any], field: str) -> None:
    documents = built("gpu-generic-guarded")
    place: Any = next(d for d in documents if d["kind"] == kind)
    for key in path:
        place = place[key]
    place[field] = ["x"]
    assert any(field in fault for fault in schema_faults(documents))


@needs_kubectl
def test_nobody_is_given_secrets_or_everything() -> None:
    rules = [rule for d in built("aws-p5") if d["kind"] in ("Role", "ClusterRole") for rule in d["rules"]]
    given = {word for rule in rules for key in ("resources", "verbs", "apiGroups") for word in rule[key]}
    assert rules and not given & {"secrets", "*", "escalate", "impersonate", "pods/exec"}


@needs_kubectl
def test_what_prometheus_scrapes_is_what_ray_opens() -> None:
    documents = built("gpu-generic-guarded")
    monitor = next(d for d in documents if d["kind"] == "PodMonitor")["spec"]
    labels, port = monitor["selector"]["matchLabels"], monitor["podMetricsEndpoints"][0]["port"]
    cluster = next(d for d in documents if d["kind"] == "RayCluster")["spec"]
    templates = [cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])]
    assert all(labels.items() <= template["metadata"]["labels"].items() for template in templates)
    ports = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    number = next(p["containerPort"] for p in ports if p["name"] == port)
    policy = next(d for d in documents if d["kind"] == "NetworkPolicy" and d["metadata"]["name"] == "ultralong-ray")[
        "spec"
    ]
    assert any({"port": number} in rule.get("ports", []) for rule in policy["ingress"])
    dashboards = next(d for d in documents if d["metadata"]["name"] == "ultralong-ray-dashboards")
    assert len(dashboards["data"]) == 4 and dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"


@needs_kubectl
def test_with_tls_every_ray_process_has_a_certificate_and_none_the_authority() -> None:
    for name, pod in pods(built("gpu-generic-guarded")):
        if name == "ultralong-ray-redis":
            continue
        variables = {v["name"]: v.get("value") for v in pod["containers"][0]["env"]}
        mounted = {m["name"] for m in pod["containers"][0]["volumeMounts"]}
        assert variables["RAY_USE_TLS"] == "1" and variables["RAY_TLS_SERVER_KEY"] == "/tls/tls.key"
        assert "tls" in mounted and "authority" not in mounted
        assert pod["initContainers"][0]["image"] == pod["containers"][0]["image"]


def calls(name: str) -> list[str]:
    """Keyword arguments `name` in the whole package, as `file:line value`."""
    found = []
    for path in [*(ROOT / "ultralong_ray").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                found += [f"{path.name}:{node.lineno} {ast.unparse(k.value)}" for k in node.keywords if k.arg == name]
    return found


def test_no_code_of_a_model_folder_is_trusted() -> None:
    found = calls("trust_remote_code")
    assert len(found) > 4 and [call for call in found if not call.endswith(" False")] == []
    assert [call for call in calls("weights_only") if not call.endswith(" True")] == []
    assert [call for call in calls("allow_pickle") if not call.endswith(" False")] == []
    texts = {p.name: p.read_text() for p in (ROOT / "ultralong_ray").rglob("*.py")}
    assert [n for n, text in texts.items() if re.search(r"\bpickle\.loads?\(", text)] == [
        "fan_out.py"
    ]  # Ray's own data


def test_random_states_that_could_run_code_are_refused(tmp_path: Path) -> None:
    from ultralong_ray.train.random_state import restore_random_state

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "was here"),)

    sink = io.BytesIO()
    import torch

    torch.save({"python": Evil()}, sink)
    for data in (sink.getvalue(), pickle.dumps(Evil())):
        with pytest.raises(UserError, match="could run code"):
            restore_random_state(data)
    assert list(tmp_path.iterdir()) == []


def test_the_threat_table_names_tests_that_exist() -> None:
    text = (ROOT / "cluster" / "README.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text[text.index("## Who could do what") :])
    assert len(named) >= 10
    assert [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text()] == []
