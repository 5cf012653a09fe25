"""Two hosts, each with its own network and address, and an S3 server on a third: quickstart training over both.

The hosts are network namespaces of this machine, joined by a bridge. Ray spills objects and the training writes its
checkpoints to the server; nothing else is shared but the disk that holds the code.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from tests.cluster.clusters import Head, head, tool

QUICKSTART = "jobs/recipes/quickstart.toml"
BUCKET = "two-hosts"
SMALL = (
    "--workdir s3://two-hosts/run --prepare.sequence_length 1024 --prepare.token_budget 8192 "
    "--prepare.holdout_sequences 2 --corpus.sources.0.max_megabytes 2 --pretrain.global_batch_sequences 4 "
    "--pretrain.micro_batch_sequences 2 --pretrain.checkpoint_every_steps 1 --sft null --evaluate null"
)
pytestmark = pytest.mark.slow

SPILL = f"""
import boto3, numpy, ray
ray.init()
parts = [ray.put(numpy.full(20 * 2**20, i, numpy.uint8)) for i in range(12)]  # 240 MiB through a store of 100 MiB
assert [int(ray.get(part)[-1]) for part in parts] == list(range(12))
keys = [item["Key"] for item in boto3.client("s3").list_objects_v2(Bucket="{BUCKET}").get("Contents", [])]
print("spilled", sum(key.startswith("spill") for key in keys))
"""
LIST = f"""
import boto3, json
pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket="{BUCKET}", Prefix="run/pretrain-")
print(json.dumps([item["Key"] for page in pages for item in page.get("Contents", [])]))
"""


def _why_not() -> str | None:
    if shutil.which("ip") is None:
        return "ip (Debian: iproute2) is not installed"
    probe = f"ulrprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode != 0:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


@dataclass(frozen=True, slots=True)
class Host:
    """A network namespace with one interface, eth0, on the bridge."""

    name: str
    ip: str

    @property
    def inside(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    tag = f"u{os.getpid() % 100_000}"  # interface names have at most 15 characters
    made = [Host(f"{tag}h{i}", f"10.213.7.{i + 1}") for i in range(count)]
    try:
        _ip(f"link add {tag}br type bridge")
        _ip(f"link set {tag}br up")
        for number, host in enumerate(made):
            _ip(f"netns add {host.name}")
            _ip(f"link add {tag}v{number} type veth peer name eth0 netns {host.name}")
            _ip(f"link set {tag}v{number} master {tag}br up")
            for words in ("link set lo up", f"addr add {host.ip}/24 dev eth0", "link set eth0 up"):
                _ip(f"-n {host.name} {words}")
        yield made
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)
        subprocess.run(["ip", "link", "delete", f"{tag}br"], capture_output=True)


@dataclass(frozen=True, slots=True)
class Site:
    """The running cluster and how a client on its first host runs something."""

    head: Head
    hosts: list[Host]

    def job(self, *command: str) -> str:
        """Output of a job that must succeed."""
        submit = [tool("ray"), "job", "submit", "--address", self.head.dashboard, "--working-dir", ".", "--"]
        done = self.head.run(*self.hosts[0].inside, *submit, *command, timeout=1500)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
        return done.stdout

    def keys(self) -> list[str]:
        done = self.head.run(*self.hosts[0].inside, sys.executable, "-c", LIST)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    pytest.importorskip("moto.server", reason="the s3-test extra is not installed")
    if why := _why_not():
        pytest.skip(why)
    with ExitStack() as stack:
        first, second, store = stack.enter_context(hosts(3))
        server = subprocess.Popen(
            [*store.inside, sys.executable, "-m", "moto.server", "-H", store.ip, "-p", "5000"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(server.kill)
        environment = {
            "AWS_ENDPOINT_URL": f"http://{store.ip}:5000",
            "AWS_ACCESS_KEY_ID": "ak",
            "AWS_SECRET_ACCESS_KEY": "sk",
            "AWS_REGION": "us-east-1",
            "GLOO_SOCKET_IFNAME": "eth0",  # else gloo asks for the address of the host's name
        }
        spilling = {"type": "smart_open", "params": {"uri": f"s3://{BUCKET}/spill"}}
        settings = {"object_spilling_config": json.dumps(spilling), "min_spilling_size": 2**20}
        options = (f"--system-config={json.dumps(settings)}",)
        started = stack.enter_context(head(1, prefix=first.inside, ip=first.ip, options=options, more=environment))
        create = f"import boto3; boto3.client('s3').create_bucket(Bucket='{BUCKET}')"
        made = started.run(*first.inside, sys.executable, "-c", create)
        assert made.returncode == 0, made.stderr
        _join(started, second)
        yield Site(started, [first, second, store])


def _join(started: Head, host: Host) -> None:
    """A node of one CPU on `host`; ended with the head, whose folder its processes name."""
    command = [*host.inside, tool("ray"), "start", f"--address={started.gcs}", f"--node-ip-address={host.ip}"]
    command += ["--num-cpus=1", "--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=104857600"]
    command += [f"--temp-dir={started.folder}/second", "--disable-usage-stats", "--block"]
    log = (started.folder / "second.log").open("wb")
    subprocess.Popen(command, env=started.environment, stdout=log, stderr=log, start_new_session=True)
    for _ in range(120):
        listed = started.run(*host.inside, tool("ray"), "list", "nodes", "--address", started.dashboard)
        if host.ip in listed.stdout:
            return
        time.sleep(1)
    raise RuntimeError("the second host did not join:\n" + (started.folder / "second.log").read_text())


def test_training_spans_both_hosts_and_its_checkpoint_lies_on_the_third(site: Site) -> None:
    scripts = [f"python jobs/{name}.py {QUICKSTART} {SMALL}" for name in ("prepare", "extend", "pretrain")]
    output = site.job("sh", "-c", " && ".join(scripts))
    for host in site.hosts[:2]:
        assert f"ip={host.ip}, pid=" in output  # Ray Train names the host of each rank
    keys = site.keys()
    step = [key for key in keys if "/checkpoints/step-00000002-" in key]
    assert {key.rsplit("/", 1)[1] for key in step} >= {"manifest.json", "state-00000.bin", "state-00001.bin"}
    assert any(key.endswith("/model/config.json") for key in keys)


def test_objects_spill_to_the_third_host(site: Site) -> None:
    output = site.job("python", "-c", SPILL)
    spilled = next(line for line in output.splitlines() if line.startswith("spilled "))
    assert int(spilled.split()[1]) > 0
