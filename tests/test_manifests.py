"""cluster/ and jobs/render.py: every document passes KubeRay's schemas, and says what the recipe's plan says."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ultralong_ray.config import Recipe
from ultralong_ray.manifests import NODE_SHARE, PLATFORM_NODES, PLATFORMS, hardware_overrides, render, train_nodes
from ultralong_ray.plan import plan_stages
from ultralong_ray.planner.hardware import parse_cluster
from ultralong_ray.planner.plan import Planned
from ultralong_ray.recipe import load_recipe
from ultralong_ray.types import UserError

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
RECIPES = ROOT / "jobs" / "recipes"
IMAGE = ["--cluster.image", "registry.example/ultralong:1"]
BATCH_OF_12 = ["--pretrain.global_batch_sequences", "12", "--sft.global_batch_sequences", "12"]
OTHER_KINDS = {"ConfigMap", "PriorityClass", "PodDisruptionBudget", "PersistentVolumeClaim", "Service", "StatefulSet"}
OTHER_KINDS |= {"NetworkPolicy", "Role", "PodMonitor", "PrometheusRule"}  # tests/cluster/test_safety.py looks at these

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which builds kustomize folders")


def built(folder: Path) -> list[dict[str, Any]]:
    text = subprocess.run(["kubectl", "kustomize", str(folder)], check=True, capture_output=True, text=True).stdout
    return list(yaml.load_all(text, Loader=yaml.CSafeLoader))


def rendered(tmp: Path, name: str, platform: str, words: list[str], queue: str | None = None) -> list[dict[str, Any]]:
    recipe, text = load_recipe(str(RECIPES / name), [*IMAGE, *words]), (RECIPES / name).read_text()
    base = os.path.relpath(ROOT / "cluster", tmp.resolve())
    for file, content in render(recipe, text, [*IMAGE, *words], platform, base, queue).items():
        (tmp / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp / file).write_text(content)
    return built(tmp)


def clusters(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Specs of all Ray clusters: of the one to explore with and of every job."""
    specs = [d["spec"] for d in documents if d["kind"] == "RayCluster"]
    return specs + [d["spec"]["rayClusterSpec"] for d in documents if d["kind"] == "RayJob"]


def faults(documents: list[dict[str, Any]]) -> list[str]:
    """Broken rules that no schema knows, one sentence each."""
    found = []
    for spec in clusters(documents):
        head = spec["headGroupSpec"]
        if head["rayStartParams"].get("num-cpus") != "0":
            found.append("the head takes tasks")
        if spec["authOptions"] != {"mode": "token"}:
            found.append("no token is asked for")
        for group in [head, *spec["workerGroupSpecs"]]:
            name, pod = group.get("groupName", "head"), group["template"]["spec"]
            if not pod["securityContext"]["runAsNonRoot"]:
                found.append(f"{name}: may run as root")
            volumes = {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                requests, limits = container["resources"]["requests"], container["resources"]["limits"]
                if requests["memory"] != limits["memory"]:
                    found.append(f"{name}: memory asked for is not its limit")
                devices = {key for key in {*requests, *limits} if "/" in key}
                found += [f"{name}: {d} differs" for d in devices if requests.get(d) != limits.get(d)]
                found += [
                    f"{name}: no volume {m['name']}" for m in container["volumeMounts"] if m["name"] not in volumes
                ]
                if container["securityContext"].get("privileged"):
                    found.append(f"{name}: privileged")
                for variable in container["env"]:
                    if re.search("TOKEN|SECRET|PASSWORD|ACCESS_KEY", variable["name"]) and "value" in variable:
                        found.append(f"{name}: {variable['name']} stands in the manifest")
    return found


@pytest.fixture(scope="module")
def crds() -> tuple[Any, Any]:
    """(check, schemas) of the strict validator, which knows KubeRay 1.7."""
    tool = SHARED / "tools" / "validate_crd.py"
    if not tool.exists() or importlib.util.find_spec("jsonschema") is None:
        pytest.skip("KubeRay's schemas are not here")
    spec = importlib.util.spec_from_file_location("validate_crd", tool)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "SafeLoader", yaml.CSafeLoader)  # the same, many times faster
        return module.check, module.load()


def schema_errors(documents: list[dict[str, Any]], crds: tuple[Any, Any]) -> list[str]:
    check, schemas = crds
    custom = [document for document in documents if document["kind"] not in OTHER_KINDS]
    return [error for document in custom for error in check(document, schemas)]


@needs_kubectl
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_overlay_is_sound(platform: str) -> None:
    documents = built(ROOT / "cluster" / "overlays" / platform)
    assert faults(documents) == []
    assert len(clusters(documents)) == 9
    spec = clusters(documents)[0]
    assert all(other == spec for other in clusters(documents))
    with_gpus = (
        "nvidia.com/gpu" in spec["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]["resources"]["limits"]
    )
    assert with_gpus == (platform != "cpu-small")


@needs_kubectl
@pytest.mark.parametrize("platform", [*PLATFORMS, "gpu-generic-guarded"])
def test_every_overlay_passes_kuberays_schemas(platform: str, crds: tuple[Any, Any]) -> None:
    assert schema_errors(built(ROOT / "cluster" / "overlays" / platform), crds) == []


@needs_kubectl
def test_the_training_group_is_the_plan(tmp_path: Path) -> None:
    words = hardware_overrides(parse_cluster("16x8xH100"))
    documents = rendered(tmp_path, "llama31_8b_4m.toml", "aws-p5", words)
    planned = [
        p for p in plan_stages(load_recipe(str(RECIPES / "llama31_8b_4m.toml"), words)) if isinstance(p, Planned)
    ]
    assert len(planned) == 2
    needed = max(p.prediction.memory.host_node_gib for p in planned if p.prediction)
    for spec in clusters(documents):
        group = spec["workerGroupSpecs"][1]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert group["maxReplicas"] * int(limits["nvidia.com/gpu"]) == 128
        assert needed + 16 < int(limits["memory"].removesuffix("Gi")) < 2048
    assert faults(documents) == []


def below_plan(documents: list[dict[str, Any]], recipe: Recipe) -> list[str]:
    """Training pods that are smaller than the recipe's plan: memory, with /dev/shm in it, GPUs and nodes."""
    planned = [p.prediction for p in plan_stages(recipe) if isinstance(p, Planned) and p.prediction]
    needed = max(prediction.memory.host_node_gib for prediction in planned)
    found = []
    for spec in clusters(documents):
        group = spec["workerGroupSpecs"][1]
        pod = group["template"]["spec"]
        limits = pod["containers"][0]["resources"]["limits"]
        shm = next(v for v in pod["volumes"] if v["name"] == "shm")["emptyDir"]["sizeLimit"]
        if int(limits["memory"].removesuffix("Gi")) - int(shm.removesuffix("Gi")) < needed:
            found.append(f"memory {limits['memory']} for a plan of {needed:.0f} GiB and {shm} of /dev/shm")
        if group["maxReplicas"] * int(limits.get("nvidia.com/gpu", 0)) != recipe.cluster.num_workers:
            found.append("GPUs are not the plan's")
    return found


@needs_kubectl
def test_memory_or_gpus_below_the_plan_are_found(tmp_path: Path) -> None:
    words = hardware_overrides(parse_cluster("16x8xH100"))
    recipe = load_recipe(str(RECIPES / "llama31_8b_4m.toml"), words)
    documents = rendered(tmp_path, "llama31_8b_4m.toml", "gpu-generic", words)
    assert below_plan(documents, recipe) == []
    group = clusters(documents)[0]["workerGroupSpecs"][1]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    resources["limits"]["memory"] = resources["requests"]["memory"] = "24Gi"
    assert [fault for fault in below_plan(documents, recipe) if fault.startswith("memory 24Gi")]
    group["maxReplicas"] = 15
    assert "GPUs are not the plan's" in below_plan(documents, recipe)


@needs_kubectl
def test_extras_are_put_into_the_folder(tmp_path: Path, crds: tuple[Any, Any]) -> None:
    recipe, text = load_recipe(str(RECIPES / "llama31_8b_1m.toml"), IMAGE), "x"
    base = os.path.relpath(ROOT / "cluster", tmp_path.resolve())
    for file, content in render(recipe, text, IMAGE, "aws-p5", base, None, ("tls", "watching")).items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    documents = built(tmp_path)
    assert faults(documents) == [] and schema_errors(documents, crds) == []
    assert {"PodMonitor", "PrometheusRule"} <= {document["kind"] for document in documents}
    inits = [
        g["template"]["spec"]["initContainers"][0] for spec in clusters(documents) for g in spec["workerGroupSpecs"]
    ]
    assert {init["image"] for init in inits} == {"registry.example/ultralong:1"}


@needs_kubectl
def test_a_run_makes_the_plan_that_its_pods_were_sized_for(tmp_path: Path) -> None:
    documents = rendered(tmp_path, "llama31_8b_1m.toml", "gpu-generic", [])
    entrypoint = next(d for d in documents if d["metadata"]["name"] == "ultralong-pretrain")["spec"]["entrypoint"]
    command, recipe_file, *overrides = entrypoint.split()[1:]
    assert (command, recipe_file) == ("jobs/pretrain.py", "/recipe/recipe.toml")
    configmap = next(d for d in documents if d["metadata"]["name"] == "ultralong-ray-recipe")
    (tmp_path / "shipped.toml").write_text(configmap["data"]["recipe.toml"])
    run, ours = (
        load_recipe(str(tmp_path / "shipped.toml"), overrides),
        load_recipe(str(RECIPES / "llama31_8b_1m.toml"), []),
    )
    assert run.cluster.node_groups and run.cluster.host_memory_gib_per_node == 2048
    plans = [[o.plan for o in plan_stages(recipe) if isinstance(o, Planned)] for recipe in (run, ours)]
    assert plans[0] == plans[1] and len(plans[0]) == 2


@needs_kubectl
@pytest.mark.parametrize("queue", ["kueue", "volcano"])
def test_a_queue_holds_one_group_at_the_plans_size(tmp_path: Path, queue: str, crds: tuple[Any, Any]) -> None:
    words = hardware_overrides(parse_cluster("4x8xH200"))
    documents = rendered(tmp_path, "llama31_8b_1m.toml", "gpu-generic", words, queue)
    assert schema_errors(documents, crds) == []
    held = {
        d["metadata"]["name"]: [g["replicas"] for g in d["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
        for d in documents
        if d["kind"] == "RayJob"
    }
    assert held["ultralong-pretrain"] == held["ultralong-sft"] == [0, 4, 0]
    assert held["ultralong-prepare"] == [4, 0, 0] and held["ultralong-evaluate"] == [0, 0, 1]
    assert held["ultralong-extend"] == [0, 0, 0] and "ultralong-pipeline" not in held


@needs_kubectl
def test_the_quickstart_renders_without_gpus(tmp_path: Path, crds: tuple[Any, Any]) -> None:
    documents = rendered(tmp_path, "quickstart.toml", "cpu-small", [])
    assert faults(documents) == [] and schema_errors(documents, crds) == []
    assert "nvidia" not in yaml.dump_all(documents)


@needs_kubectl
def test_planted_faults_are_caught(crds: tuple[Any, Any]) -> None:
    documents = built(ROOT / "cluster" / "overlays" / "gpu-generic")
    broken = copy.deepcopy(documents)
    job = next(d for d in broken if d["kind"] == "RayJob")
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 2
    assert any("maxReplica" in error for error in schema_errors(broken, crds))
    broken = copy.deepcopy(documents)
    container = clusters(broken)[0]["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]
    del container["resources"]["limits"]["nvidia.com/gpu"]
    container["resources"]["requests"]["memory"] = "1Gi"
    container["env"].append({"name": "HF_TOKEN", "value": "hf_x"})
    assert {fault.split(": ", 1)[1] for fault in faults(broken)} == {
        "nvidia.com/gpu differs",
        "memory asked for is not its limit",
        "HF_TOKEN stands in the manifest",
    }


@pytest.mark.parametrize(
    ("words", "platform", "said"),
    [
        (["--cluster.gpu", "V100"], "gpu-generic", "cluster.gpu 'V100' is not in the planner's table"),
        (
            ["--cluster.num_workers", "12", *BATCH_OF_12],
            "gpu-generic",
            "does not fill nodes of cluster.gpus_per_node 8",
        ),
        (["--cluster.host_memory_gib_per_node", "64"], "gpu-generic", "64"),
        ([], "cpu-small", "the recipe trains with GPUs"),
        (["--cluster.gpu", "H200"], "aws-p5", "selects nodes with H100s, the plan is for cluster.gpu H200"),
        (["--cluster.gpu", "B200"], "gke-a3", "--platform gpu-generic"),
        (["--cluster.image", "Registry/U:1 2"], "gpu-generic", "cluster.image 'Registry/U:1 2'"),
        (["--cluster.image", "a/b@sha256:abc"], "gpu-generic", "cluster.image 'a/b@sha256:abc'"),
    ],
)
def test_what_cannot_be_is_refused_in_words(words: list[str], platform: str, said: str) -> None:
    with pytest.raises((UserError, ValueError), match=re.escape(said)):
        recipe = load_recipe(str(RECIPES / "llama31_8b_1m.toml"), [*IMAGE, *words])
        render(recipe, "", [], platform, "../cluster")


@pytest.mark.parametrize("image", [None, "registry.example:5000/ultralong"])
def test_an_image_without_a_tag_is_refused(image: str | None) -> None:
    words = [] if image is None else ["--cluster.image", image]
    with pytest.raises(UserError, match=r"cluster\.image"):
        render(load_recipe(str(RECIPES / "llama31_8b_1m.toml"), words), "", [], "gpu-generic", "../cluster")


@pytest.mark.parametrize("platform", PLATFORM_NODES)
def test_a_platform_is_what_its_manifests_say(platform: str) -> None:
    gpu, host_gib = PLATFORM_NODES[platform]
    said = (ROOT / "cluster/platforms" / platform / "kustomization.yaml").read_text()
    memory = {2048: "2 TiB", 1743: "1872 GB"}[host_gib]
    assert f"8 x {gpu}" in said and memory in said and round(1872e9 / 2**30) == 1743


def test_p5en_has_its_own_nodes_and_adapters(tmp_path: Path) -> None:
    documents = rendered(tmp_path, "llama31_8b_1m.toml", "aws-p5en", ["--cluster.gpu", "H200", *IMAGE])
    for cluster in clusters(documents):
        _, train, evaluation = cluster["workerGroupSpecs"]
        for group in (train, evaluation):
            selected = group["template"]["spec"]["nodeSelector"]
            assert selected == {"node.kubernetes.io/instance-type": "p5en.48xlarge"}
        resources = train["template"]["spec"]["containers"][0]["resources"]
        assert resources["limits"]["vpc.amazonaws.com/efa"] == resources["requests"]["vpc.amazonaws.com/efa"] == "16"


def test_pods_fit_the_nodes_that_the_platform_selects() -> None:
    """2,048 GiB, the vendor's own server, are more than an a3 node has; what is planned there is pinned for the run."""
    recipe = load_recipe(str(RECIPES / "llama31_8b_4m.toml"), [*IMAGE, "--cluster.num_workers=8"])
    files = render(recipe, "", [], "gke-a3", "../cluster")
    memory = int(re.findall(r"value: (\d+)Gi # pretrain", files["plan/numbers.yaml"])[0])
    assert memory <= NODE_SHARE * 1743 < train_nodes(recipe).memory_gib
    assert "--cluster.host_memory_gib_per_node 1743" in files["plan/settings.yaml"]
    digest = load_recipe(str(RECIPES / "llama31_8b_1m.toml"), ["--cluster.image", "r.io:5000/a/b@sha256:" + 64 * "0"])
    assert render(digest, "", [], "gke-a3", "../cluster")


def test_the_same_recipe_gives_the_same_text_and_says_where_memory_comes_from() -> None:
    recipe = load_recipe(str(RECIPES / "llama31_8b_1m.toml"), IMAGE)
    one, two = (render(recipe, "x", [], "gpu-generic", "../cluster") for _ in range(2))
    assert one == two
    nodes = train_nodes(recipe)
    assert f"value: {nodes.memory_gib}Gi # pretrain: 8 ranks x" in one["plan/numbers.yaml"]
