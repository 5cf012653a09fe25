"""Submission from another directory with another virtual environment, which holds nothing but Ray; only with the token.

The client's environment is a bare one that sees Ray alone of this machine's packages: no torch, no transformers, not
this project.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.cluster.clusters import ROOT, Head, clean_environment, head
from tests.machine import PATIENCE_SECONDS

# Of ray[default]: what `ray job submit` imports.
CLIENT_PACKAGES = (
    *("ray", "click", "filelock", "jsonschema", "msgpack", "packaging", "protobuf", "pyyaml", "requests"),
    *(
        "aiohttp",
        "aiohttp_cors",
        "aiosignal",
        "attrs",
        "charset_normalizer",
        "certifi",
        "colorful",
        "frozenlist",
        "idna",
    ),
    *("multidict", "opencensus", "prometheus_client", "propcache", "pydantic", "pydantic_core", "py-spy", "smart_open"),
    *(
        "referencing",
        "rpds-py",
        "jsonschema-specifications",
        "typing_extensions",
        "typing-inspection",
        "urllib3",
        "yarl",
    ),
    *("annotated-types", "aiohappyeyeballs", "wrapt", "virtualenv", "grpcio"),
)
TOO_MUCH = """
import ray, sys
from ultralong_ray import nodes
from ultralong_ray.recipe import load_recipe
ray.init(logging_level="ERROR")
nodes.NEVER_SECONDS = 2.0
recipe = load_recipe("jobs/recipes/quickstart.toml")
nodes.wait_for_nodes(recipe, "prepare")
print("prepare may start")
try:
    nodes.wait_for_nodes(recipe, "pretrain")
except nodes.UserError as refusal:
    print(refusal)
print("placement groups left:", [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"])
"""
SCRIPT = "import torch, ultralong_ray; print('the job ran with torch and', ultralong_ray.__file__)"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    with head(1) as started:
        yield started


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a virtual environment with Ray alone: links to the installed packages that it needs."""
    folder = tmp_path_factory.mktemp("client")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "venv" / "lib" / version / "site-packages"
    for name in CLIENT_PACKAGES:
        try:
            package = distribution(name)
        except ModuleNotFoundError:
            continue
        for top in {Path(file).parts[0] for file in package.files or () if ".." not in Path(file).parts}:
            if top != "__pycache__" and not (site / top).exists():
                (site / top).symlink_to(Path(str(package.locate_file(top))).resolve())
    ray = python.with_name("ray")
    ray.write_text(f"#!{python}\nimport sys\nfrom ray.scripts.scripts import main\nsys.exit(main())\n")
    ray.chmod(0o755)
    return python.parent


def submit(cluster: Head, client: Path, where: Path, **auth: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in clean_environment(**auth).items() if key != "PYTHONPATH"}
    environment |= {"PATH": f"{client}:/usr/bin:/bin", "HOME": str(where)}  # no token in ~/.ray either
    command = [client / "ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", ROOT, "--"]
    command += ["python", "-c", SCRIPT]
    seconds = PATIENCE_SECONDS
    return subprocess.run(command, env=environment, cwd=where, capture_output=True, text=True, timeout=seconds)


def test_the_client_has_ray_and_nothing_of_the_project(client: Path) -> None:
    names = "('ray', 'torch', 'transformers', 'ultralong_ray')"
    code = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = subprocess.run([client / "python", "-c", code], env=environment, cwd=client, capture_output=True, text=True)
    assert found.stdout.strip() == "['ray']", found.stderr


def test_the_token_decides(cluster: Head, client: Path, tmp_path: Path) -> None:
    for auth in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}):
        refused = submit(cluster, client, tmp_path, **auth)
        output = refused.stdout + refused.stderr
        assert refused.returncode != 0
        assert "token" in output.lower() and "the job ran" not in output, output
    token = cluster.environment["RAY_AUTH_TOKEN"]
    accepted = submit(cluster, client, tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    assert accepted.returncode == 0, accepted.stdout[-3000:] + accepted.stderr[-3000:]
    line = next(line for line in accepted.stdout.splitlines() if line.startswith("the job ran with torch and"))
    assert "_ray_pkg_" in line  # the submitted working directory, not a package that the nodes have installed
    assert token not in accepted.stdout + accepted.stderr


def test_a_cluster_without_autoscaler_says_what_it_lacks_and_holds_nothing(cluster: Head) -> None:
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.gcs}
    done = cluster.run(sys.executable, "-c", TOO_MUCH, env=environment)
    assert "prepare may start" in done.stdout, done.stderr
    assert "pretrain needs 2 x {CPU 1}. The cluster does not have it and never will have it" in done.stdout
    assert "no autoscaler runs. It has 1 x node {CPU 1}." in done.stdout
    assert "placement groups left: []" in done.stdout
