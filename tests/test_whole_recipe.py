"""The whole recipe as a Ray job on a real local Ray cluster, with everything in object storage.

Small sizes, real parts: Ray Data, Ray Train, DeepSpeed ZeRO-3 at sequence-parallel degree 2 with gloo, the shipped base
model and its tokenizer, the S3 protocol for the working directory.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.cluster.clusters import Head, head, tool
from ultralong_ray.recipe import load_recipe
from ultralong_ray.stages import stage_directory, stages
from ultralong_ray.storage import Location, local_folder

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = "jobs/recipes/quickstart.toml"
SMALL = [
    "prepare.sequence_length=1024",
    "prepare.token_budget=8192",
    "prepare.holdout_sequences=2",
    "corpus.sources.0.max_megabytes=2",
    "pretrain.global_batch_sequences=4",
    "pretrain.micro_batch_sequences=2",
    "pretrain.checkpoint_every_steps=1",
    "sft.num_samples=40",
    "sft.steps=1",
    "sft.global_batch_sequences=2",
    "sft.micro_batch_sequences=2",
    "evaluate.context_lengths=[256, 1024]",
    "evaluate.depths_percent=[0, 50]",
    "evaluate.samples_per_cell=2",
    "evaluate.perplexity_buckets=4",
    "evaluate.tasks.0.context_lengths=[512]",
    'evaluate.tasks.0.names=["vt", "qa_1"]',
]


def submit(cluster: Head, workdir: str) -> subprocess.CompletedProcess[str]:
    command = ["python", "jobs/pipeline.py", QUICKSTART, "--workdir", workdir, *SMALL]
    submission = [tool("ray"), "job", "submit", "--address", cluster.dashboard, "--working-dir", str(ROOT)]
    return cluster.run(*submission, "--", *command, timeout=900)


def test_from_shards_to_report_in_object_storage(s3_uri: str, tmp_path: Path) -> None:
    workdir = f"{s3_uri}/whole"
    with head(2) as cluster:
        done, again = submit(cluster, workdir), submit(cluster, workdir)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    recipe = load_recipe(str(ROOT / QUICKSTART), ["--workdir", workdir, *SMALL])
    directories = {stage: stage_directory(recipe, stage) for stage in stages(recipe)}
    assert all(directory.done for directory in directories.values())

    losses = [
        json.loads(line) for line in (directories["pretrain"].location / "metrics.jsonl").read_bytes().splitlines()
    ]
    assert [record["step"] for record in losses] == [1, 2]
    assert all(0 < record["loss"] < 8 for record in losses)
    summary = directories["evaluate"].summary()
    assert summary["models"]["base"]["mean_within_base_window"] == 1.0
    assert summary["models"]["base"]["mean_beyond_base_window"] == 0.0
    assert summary["models"]["final"]["mean_within_base_window"] >= 0.5
    page = (directories["report"].location / "report.html").read_bytes().decode()
    assert "<svg" in page

    from transformers import pipeline

    folder = local_folder(directories["export"].location / "model", tmp_path)
    answer = pipeline("text-generation", model=str(folder))("The pass key", max_new_tokens=4)
    assert answer[0]["generated_text"].startswith("The pass key")

    assert again.returncode == 0
    assert again.stdout.count("done already") == len(directories)
    assert Location.of(workdir).is_dir()
