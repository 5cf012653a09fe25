"""A recipe and its plan in; the kustomize files that give KubeRay exactly the nodes of that plan out. Text only.

The readable parts stand in cluster/. What is written here is one patch with the numbers of a recipe, the recipe itself
and the list of what is put together, so that recipe and cluster come from one source. Read against KubeRay 1.7 and
kustomize 5.5. The groups of cluster/base/raycluster.yaml are, in this order: data, train, eval.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass

from ultralong_ray.config import Recipe
from ultralong_ray.plan import plan_stages
from ultralong_ray.planner.hardware import Hardware
from ultralong_ray.planner.plan import hardware_of
from ultralong_ray.planner.predict import Prediction
from ultralong_ray.types import UserError

PLATFORMS = ("cpu-small", "gpu-generic", "aws-p5", "aws-p5en", "gke-a3")
QUEUES = ("kueue", "volcano")
EXTRAS = ("watching", "tls")
# GPU and GiB of host memory of the nodes that cluster/platforms/ selects there
PLATFORM_NODES = {"aws-p5": ("H100", 2048), "aws-p5en": ("H200", 2048), "gke-a3": ("H100", 1743)}
IMAGE = re.compile(r"[a-z0-9][a-z0-9._:/-]*?(:\w[\w.-]{0,127})?(@sha256:[0-9a-f]{64})?", re.ASCII)
SHM_GIB = 16  # /dev/shm of a training pod: Ray's object store (8 GiB in the base) and NCCL's buffers [chosen]
RAY_GIB = 8  # Ray's own processes, and the 4 GiB that the preflight check wants free [chosen]
NODE_SHARE = 0.95  # of a node's memory that pods can have: the rest is the system's [chosen]
CPU_WORKER_GIB = 3  # of a training process without a GPU, whose memory is not predicted [chosen]
CPU_EVALUATION_WORKERS = 2
CHECKPOINT_BYTES = 14  # per parameter: bfloat16 weights, float32 weights, Adam's two float32 moments
GIB = 2**30
PLAN_COMPONENT = """# What one recipe and its plan change in the base.
apiVersion: kustomize.config.k8s.io/v1alpha1
kind: Component
configMapGenerator:
  - name: ultralong-ray-recipe
    files: [recipe.toml]
    options: {disableNameSuffixHash: true}
patches:
  - path: numbers.yaml
    target: {kind: RayCluster}
  - path: settings.yaml
"""


@dataclass(frozen=True, slots=True)
class TrainNodes:
    """The pods of the training group; each sentence of `why` says where one number comes from."""

    nodes: int
    gpus: int  # of a pod
    cpus: int
    memory_gib: int
    shm_gib: int
    scratch_gib: int
    why: dict[str, str]


def hardware_overrides(hardware: Hardware) -> list[str]:
    """The recipe overrides that make [cluster] this hardware, as `load_recipe` takes them."""
    values = {
        "num_workers": hardware.num_gpus,
        "gpu": hardware.gpu.name,
        "gpus_per_node": hardware.gpus_per_node,
        "host_memory_gib_per_node": f"{hardware.host_memory_gib_per_node:g}",
        "network_gbytes_per_second": f"{hardware.network_gbytes_per_second:g}",
    }
    return [word for name, value in values.items() for word in (f"--cluster.{name}", str(value))]


def train_nodes(recipe: Recipe) -> TrainNodes:
    """What the training group must hold for every training stage of the recipe.

    Raises UserError where the planner refuses a stage, where no GPU is named, and where a pod is larger than a node.
    """
    cluster = recipe.cluster
    if not cluster.gpus_per_worker:
        return _cpu_nodes(recipe)
    if cluster.gpus_per_worker != 1:
        raise UserError(f"cluster.gpus_per_worker {cluster.gpus_per_worker:g}: a pod's GPUs are whole; set it to 1")
    hardware = hardware_of(recipe)
    if hardware is None:
        named = "is not given" if cluster.gpu is None else f"{cluster.gpu!r} is not in the planner's table"
        raise UserError(f"cluster.gpu {named}; name one that the planner knows (H100, H200, A100, B200), or --cluster")
    if hardware.num_gpus % hardware.gpus_on_a_node:
        raise UserError(
            f"cluster.num_workers {hardware.num_gpus} does not fill nodes of cluster.gpus_per_node "
            f"{hardware.gpus_per_node}; pods of one group are equal, so make it a multiple"
        )
    outcomes = plan_stages(recipe)
    for outcome in outcomes:
        if isinstance(outcome, UserError):
            raise outcome
    predictions = {o.section.name: o.prediction for o in outcomes if not isinstance(o, UserError) and o.prediction}
    if len(predictions) < len(outcomes):
        raise UserError('a training stage has no prediction (attention = "math"?), so its memory is not known')
    return _gpu_nodes(recipe, hardware, predictions)


def _gpu_nodes(recipe: Recipe, hardware: Hardware, predictions: dict[str, Prediction]) -> TrainNodes:
    stage, largest = max(predictions.items(), key=lambda item: item[1].memory.host_node_gib)
    memory = math.ceil(largest.memory.host_node_gib + SHM_GIB + RAY_GIB)
    if memory > NODE_SHARE * hardware.host_memory_gib_per_node:
        raise UserError(
            f"{stage}: a training pod needs {memory} GiB, a node of cluster.host_memory_gib_per_node "
            f"{hardware.host_memory_gib_per_node:g} gives pods {NODE_SHARE * hardware.host_memory_gib_per_node:.0f}; "
            f'give more nodes, or keep less on the host ({stage}.keep_attention_rows, keep_inputs = "device")'
        )
    parameters = largest.work.shape.parameters
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in largest.memory.host.items())
    gpus = hardware.gpus_on_a_node
    return TrainNodes(
        nodes=hardware.num_nodes,
        gpus=gpus,
        cpus=math.ceil(gpus * recipe.cluster.cpus_per_worker),
        memory_gib=memory,
        shm_gib=SHM_GIB,
        scratch_gib=math.ceil(2 * CHECKPOINT_BYTES * parameters / GIB),
        why={
            "nodes": f"{hardware.num_gpus} GPUs (cluster.num_workers), {gpus} on a node",
            "cpus": f"{gpus} x cluster.cpus_per_worker {recipe.cluster.cpus_per_worker:g}",
            "memory": f"{stage}: {gpus} ranks x {largest.memory.host_gib:.1f} GiB ({parts}), "
            f"{SHM_GIB} of /dev/shm, {RAY_GIB} for Ray and in reserve",
            "scratch": f"two checkpoints of {parameters:,} parameters x {CHECKPOINT_BYTES} bytes",
        },
    )


def _cpu_nodes(recipe: Recipe) -> TrainNodes:
    cluster = recipe.cluster
    cpus = math.ceil(cluster.num_workers * cluster.cpus_per_worker)
    memory = math.ceil(cluster.host_memory_gib_per_node or CPU_WORKER_GIB * cluster.num_workers)
    asked = (
        "cluster.host_memory_gib_per_node" if cluster.host_memory_gib_per_node else f"{CPU_WORKER_GIB} GiB x workers"
    )
    why = {
        "nodes": "training without GPUs, all processes in one pod",
        "cpus": f"{cluster.num_workers} workers x cluster.cpus_per_worker {cluster.cpus_per_worker:g}",
        "memory": f"{asked}; nothing is predicted without a GPU",
        "scratch": "as in platforms/cpu-small",
    }
    return TrainNodes(1, 0, cpus, memory, 1, 10, why)


def render(
    recipe: Recipe,
    recipe_text: str,
    overrides: list[str],
    platform: str,
    base: str,
    queue: str | None = None,
    extras: tuple[str, ...] = (),
) -> dict[str, str]:
    """File name -> text of a kustomize folder for `recipe`, whose file is `recipe_text` under `overrides`.

    `base`: the relative path from that folder to cluster/; `extras`: components to add, of EXTRAS. The same arguments
    give the same text. Raises UserError for what a cluster could not run.
    """
    on_cpu = not recipe.cluster.gpus_per_worker
    if on_cpu != (platform == "cpu-small"):
        has, fitting = (
            ("no GPUs", "cpu-small") if on_cpu else ("GPUs", f"{', '.join(PLATFORMS[1:-1])} or {PLATFORMS[-1]}")
        )
        raise UserError(
            f"--platform {platform}: the recipe trains with {has} (cluster.gpus_per_worker); take {fitting}"
        )
    image = recipe.cluster.image
    if image is None:
        raise UserError("cluster.image is not given; name the image that cluster/Dockerfile built, with its tag")
    if not IMAGE.fullmatch(image):
        raise UserError(f"cluster.image {image!r} is no image: name it lower-case, then :tag or @sha256: and 64 digits")
    recipe = _on_nodes_of(recipe, platform)
    nodes = train_nodes(recipe)
    return {
        "kustomization.yaml": _kustomization(image, platform, base, queue, _replicas(recipe, nodes), extras),
        "plan/kustomization.yaml": PLAN_COMPONENT,
        "plan/numbers.yaml": _plan_patch(recipe, nodes),
        "plan/settings.yaml": _settings([*overrides, *_pinned(recipe)]),
        "plan/recipe.toml": recipe_text,
    }


def _on_nodes_of(recipe: Recipe, platform: str) -> Recipe:
    """The recipe planned for no more host memory than a node of the platform has. Raises UserError for another GPU."""
    hardware = hardware_of(recipe)
    if hardware is None or platform not in PLATFORM_NODES:
        return recipe
    gpu, host_gib = PLATFORM_NODES[platform]
    if hardware.gpu.name != gpu:
        raise UserError(
            f"--platform {platform} selects nodes with {gpu}s, the plan is for cluster.gpu {hardware.gpu.name}; take "
            f"--cluster ...x{gpu}, a platform of that GPU, or --platform gpu-generic"
        )
    if hardware.host_memory_gib_per_node <= host_gib:
        return recipe
    cluster = recipe.cluster.model_copy(update={"host_memory_gib_per_node": float(host_gib)})
    return recipe.model_copy(update={"cluster": cluster})


def _replicas(recipe: Recipe, nodes: TrainNodes) -> dict[str, tuple[int, int]]:
    """Stage (a pattern of names) -> (index of its group, pods): what a queue holds, since it needs a fixed size."""
    evaluation = _evaluation_nodes(recipe)
    return {"prepare": (0, recipe.cluster.data_nodes), "(pretrain|sft)": (1, nodes.nodes), "evaluate": (2, evaluation)}


def evaluation_workers(recipe: Recipe) -> int:
    """Evaluation tasks at a time: as given, else what fills one node; two on CPUs."""
    tasks = recipe.cluster.evaluation_workers
    if tasks is None and recipe.evaluate is not None and recipe.evaluate.gpus_per_task:
        tasks = max(1, int(recipe.cluster.gpus_per_node / recipe.evaluate.gpus_per_task))
    return tasks or CPU_EVALUATION_WORKERS


def _pinned(recipe: Recipe) -> list[str]:
    """Overrides that keep a run at the plan of its pods: without them, a pod's memory would be taken for a node's."""
    words = ["--cluster.evaluation_workers", str(evaluation_workers(recipe))]
    hardware = hardware_of(recipe)
    if hardware is not None:
        words += ["--cluster.host_memory_gib_per_node", f"{hardware.host_memory_gib_per_node:g}"]
    return words


def _evaluation_nodes(recipe: Recipe) -> int:
    if recipe.evaluate is None or not recipe.evaluate.gpus_per_task:
        return 1
    return math.ceil(evaluation_workers(recipe) * recipe.evaluate.gpus_per_task / _evaluation_gpus(recipe))


def _evaluation_gpus(recipe: Recipe) -> int:
    """GPUs of an evaluation pod: a node's, or what all tasks at a time take where that is less."""
    assert recipe.evaluate is not None
    asked = math.ceil(evaluation_workers(recipe) * recipe.evaluate.gpus_per_task)
    return min(recipe.cluster.gpus_per_node, asked)


def _kustomization(
    image: str,
    platform: str,
    base: str,
    queue: str | None,
    replicas: dict[str, tuple[int, int]],
    extras: tuple[str, ...],
) -> str:
    name, _, digest = image.partition("@")
    tag = ""
    if not digest and ":" in name.rsplit("/", 1)[-1]:
        name, _, tag = name.rpartition(":")
    pinned = f'digest: "{digest}"' if digest else f'newTag: "{tag}"'
    if not (digest or tag):
        raise UserError(f"cluster.image {image!r} has neither tag nor digest; name one, so that runs can be repeated")
    parts = [f"platforms/{platform}", *([] if platform == "cpu-small" else ["components/redis"])]
    parts += [f"components/{extra}" for extra in EXTRAS if extra in extras]
    lines = [
        "# Written by jobs/render.py; change the recipe and write it anew.",
        "apiVersion: kustomize.config.k8s.io/v1beta1",
        "kind: Kustomization",
        f"resources: [{base}/base]",
        "components: # in this order",
        *(f"  - {base}/{part}" for part in parts),
        "  - plan",
        f"  - {base}/finish",
        *([f"  - {base}/components/{queue}"] if queue else []),
        f'images: [{{name: ultralong-ray, newName: "{name}", {pinned}}}]',
    ]
    if queue:
        lines.append("patches: # the queue admits a fixed number of pods")
        for stage, (index, pods) in replicas.items():
            path = f"/spec/rayClusterSpec/workerGroupSpecs/{index}/replicas"
            lines += [
                f"  - target: {{kind: RayJob, name: ultralong-{stage}}}",
                "    patch: |",
                f"      - {{op: replace, path: {path}, value: {pods}}}",
            ]
    return "\n".join(lines) + "\n"


def _settings(overrides: list[str]) -> str:
    words = shlex.join(["/recipe/recipe.toml", *overrides])
    return (
        "# The recipe and its overrides, which finish/ writes into the entrypoints.\n"
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: ultralong-ray-settings}\n"
        f"data:\n  recipe: {_quoted(words)}\n"
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _plan_patch(recipe: Recipe, nodes: TrainNodes) -> str:
    """JSON patch of the RayCluster: the training group as planned, the limits of the others, the recipe's file."""
    group = "/spec/workerGroupSpecs"
    gpu = f', nvidia.com/gpu: "{nodes.gpus}"' if nodes.gpus else ""
    lines = [f"# The numbers of recipe {recipe.name}. 0: data, 1: train, 2: eval."]
    lines += _replace(f"{group}/0/maxReplicas", f"{recipe.cluster.data_nodes}", "cluster.data_nodes")
    lines += _replace(f"{group}/1/maxReplicas", f"{nodes.nodes}", nodes.why["nodes"])
    for kind in ("requests", "limits"):
        container = f"{group}/1/template/spec/containers/0/resources/{kind}"
        lines += _replace(f"{container}/cpu", f'"{nodes.cpus}"', nodes.why["cpus"])
        lines += _replace(f"{container}/memory", f"{nodes.memory_gib}Gi", nodes.why["memory"])
        if gpu:
            lines += _replace(f"{container}/nvidia.com~1gpu", f'"{nodes.gpus}"', nodes.why["nodes"])
    disk = f"{group}/1/template/spec/containers/0/resources/requests/ephemeral-storage"
    lines += _replace(disk, f"{nodes.scratch_gib}Gi", nodes.why["scratch"])
    volumes = f"{group}/1/template/spec/volumes"
    lines += _replace(f"{volumes}/0/emptyDir/sizeLimit", f"{nodes.shm_gib}Gi", "counts as memory")
    lines += _replace(f"{volumes}/1/emptyDir/sizeLimit", f"{nodes.scratch_gib}Gi", nodes.why["scratch"])
    tasks = "cluster.evaluation_workers x evaluate.gpus_per_task over the GPUs of a node"
    lines += _replace(f"{group}/2/maxReplicas", f"{_evaluation_nodes(recipe)}", tasks)
    if gpu and recipe.evaluate is not None:
        for kind in ("requests", "limits"):
            container = f"{group}/2/template/spec/containers/0/resources/{kind}"
            lines += _replace(f"{container}/nvidia.com~1gpu", f'"{_evaluation_gpus(recipe)}"', tasks)
    head = "/spec/headGroupSpec/template/spec"
    lines += _add(f"{head}/volumes/-", "{name: recipe, configMap: {name: ultralong-ray-recipe}}")
    lines += _add(f"{head}/containers/0/volumeMounts/-", "{name: recipe, mountPath: /recipe, readOnly: true}")
    return "\n".join(lines) + "\n"


def _replace(path: str, value: str, why: str) -> list[str]:
    return ["- op: replace", f"  path: {path}", f"  value: {value} # {why}"]


def _add(path: str, value: str) -> list[str]:
    return ["- op: add", f"  path: {path}", f"  value: {value}"]
