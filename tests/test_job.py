"""The scripts of jobs/ as a user runs them: exit statuses, messages, what is skipped and what a failure leaves."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import AuthenticationError

from tests.machine import PATIENCE_SECONDS
from ultralong_ray import job, pipeline
from ultralong_ray.recipe import load_recipe
from ultralong_ray.stages import OF_MODELS, inputs, stage_directory, stages
from ultralong_ray.storage import StageDirectory
from ultralong_ray.types import UserError

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = "jobs/recipes/quickstart.toml"
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, f"jobs/{name}.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path):
    for name in ("prepare", "extend", "pretrain", "sft", "export", "evaluate", "report", "pipeline"):
        done = run_script(name, QUICKSTART, "--dry-run", "--workdir", str(tmp_path / "run"))
        assert done.returncode == 0, done.stderr
        assert "80 sequences of 4,096" in done.stdout
        assert str(tmp_path / "run" / "pretrain-") in done.stdout
    assert not (tmp_path / "run").exists()


def test_plan_only_prints_the_plan_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(ROOT / QUICKSTART), "--plan-only"])
    ran: list[str] = []
    job.guarded(
        lambda *_: ran.append("stage"),
        job.Only("--plan-only", "", lambda recipe, *_: print(f"plan of {recipe.name}")),
    )
    assert "plan of " in capsys.readouterr().out and ran == []
    with pytest.raises(SystemExit):  # a script without a plan takes it for an override
        job.guarded(lambda *_: ran.append("stage"))
    assert ran == []


def test_a_flag_of_several_words_gives_them_to_the_action(monkeypatch: pytest.MonkeyPatch):
    got: list[tuple[str, ...]] = []
    words = ["--only", "a", "b", "--name", "other", "--only", "c"]
    monkeypatch.setattr(sys, "argv", ["tune.py", str(ROOT / QUICKSTART), *words])
    job.guarded(
        lambda recipe, path, _, only: got.append((recipe.name, *only)), several=job.Several("--only", "", "", "+")
    )
    assert got == [("other", "a", "b", "c")]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", str(ROOT / QUICKSTART), "--resume-anyway", "x"])
    job.guarded(lambda recipe, path, _, fields: got.append(fields), several=job.RESUME_ANYWAY)
    assert got[1:] == [("x",)]


def test_a_stage_without_its_input_names_it(tmp_path: Path):
    words = [QUICKSTART, "--workdir", f"{tmp_path}/a b", "--prepare.seed", "7"]
    done = run_script("pretrain", *words)
    assert done.returncode == 2
    assert "prepare-" in done.stderr
    assert f"python jobs/extend.py {shlex.join(words)}\n" in done.stderr, "without the overrides it makes another"
    assert "Traceback" not in done.stderr


def test_a_stage_that_the_recipe_lacks_says_so(tmp_path: Path):
    done = run_script("sft", QUICKSTART, "--workdir", str(tmp_path), "--sft", "null")
    assert done.returncode == 0 and "no [sft] section: nothing to do" in done.stdout


def test_a_store_out_of_reach_is_said(tmp_path: Path):
    store = ("--storage.endpoint", "http://127.0.0.1:1", "--storage.max_attempts", "1")
    done = run_script("prepare", QUICKSTART, "--workdir", "s3://bucket/run", *store)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the storage cannot be reached: the store does not answer")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["folder", "--parquet", "README.md"], "error: --parquet README.md is no Parquet file with a column text"),
        (["folder", "--parquet", "absent"], "error: --parquet absent is no Parquet file with a column text"),
        (["folder", "--vocab-size", "10"], "error: --vocab-size 10: the bytes and 6 special tokens are 262"),
        (["README.md"], "error: README.md is a file; name a folder"),
    ],
)
def test_a_tokenizer_that_cannot_be_made_is_explained(arguments: list[str], words: str):
    done = run_script("tokenizer", *arguments, "--max-megabytes", "0.001")
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_heads_of_the_base_model_are_checked_before_anything_starts(tmp_path: Path):
    overrides = "--cluster.num_workers 8 --pretrain.sequence_parallel_degree 8 --pretrain.ulysses_degree 8"
    done = run_script("pipeline", QUICKSTART, "--workdir", str(tmp_path), *overrides.split())
    assert done.returncode == 2
    assert "degree 8 cannot split 4 query heads and 2 key-value heads; degrees that can: 1, 2, 4" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_sigterm_leaves_with_a_message():
    code = (
        "import sys, time\nfrom ultralong_ray.job import guarded\n"
        f"sys.argv = ['x', '{QUICKSTART}']\n"
        "guarded(lambda *_: (print('running', flush=True), time.sleep(60)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 143
    assert "stopped by SIGTERM" in errors


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages computed, in order; computing is replaced by noting the name."""
    computed: list[str] = []

    def compute(recipe: Any, stage: str, directory: StageDirectory, *_: Any) -> dict[str, Any]:
        computed.append(stage)
        if stage in OF_MODELS:
            (directory.location / "model/config.json").write_json({})
        return {"number": len(computed)}

    monkeypatch.setattr(job, "compute", compute)
    monkeypatch.setattr(job, "connect_to_ray", lambda: None)
    monkeypatch.setattr(job, "await_nodes", lambda *_: None)
    return computed


@pytest.mark.parametrize("refusal", [RuntimeError, AuthenticationError])
def test_a_cluster_that_cannot_be_joined_gets_words(monkeypatch: pytest.MonkeyPatch, refusal: type[Exception]):
    def init(**_: Any) -> None:
        raise refusal("Version mismatch: The cluster was started with Python 3.12")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ultralong_ray.nodes.silent_head", lambda: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UserError, match=r"(?s)10\.0\.0\.1:6379.*Version mismatch.*RAY_ADDRESS=local starts one"):
        job.connect_to_ray()


def test_a_head_that_died_gets_words_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray would try for minutes"))
    monkeypatch.setattr("ultralong_ray.nodes.silent_head", lambda: "10.0.0.1:6379")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(
        UserError, match=r"(?s)the cluster that runs here.*nothing listens at 10\.0\.0\.1:6379.*ray stop"
    ):
        job.connect_to_ray()


def test_a_done_stage_is_not_computed_again(tmp_path: Path, counted: list[str]):
    recipe = load_recipe(str(ROOT / QUICKSTART), ["--workdir", str(tmp_path)])
    for _ in range(2):
        for stage in stages(recipe):
            job.run_stage(recipe, stage, QUICKSTART)
    assert counted == stages(recipe)
    assert stage_directory(recipe, "extend").summary()["number"] == 1 + stages(recipe).index("extend")


def test_a_failed_stage_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = load_recipe(str(ROOT / QUICKSTART), ["--workdir", str(tmp_path)])
    for name in inputs(recipe, "pretrain"):
        stage_directory(recipe, name).mark_done({})
    (stage_directory(recipe, "extend").location / "model/config.json").write_json({})

    def compute(*_: Any) -> dict[str, Any]:
        raise UserError("the disk is full")

    monkeypatch.setattr(job, "compute", compute)
    monkeypatch.setattr(job, "connect_to_ray", lambda: None)
    monkeypatch.setattr(job, "await_nodes", lambda *_: None)
    with pytest.raises(UserError, match="the disk is full"):
        job.run_stage(recipe, "pretrain", QUICKSTART)
    assert not stage_directory(recipe, "pretrain").done


def test_the_pipeline_starts_only_what_is_not_done_and_names_what_failed(tmp_path: Path):
    recipe = load_recipe(str(ROOT / QUICKSTART), ["--workdir", str(tmp_path)])
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    for stage in stages(recipe):
        (jobs / f"{stage}.py").write_text(
            f"import sys; open({str(tmp_path)!r} + '/started', 'a').write('{stage} '); sys.exit('{stage}' == 'sft')"
        )
    stage_directory(recipe, "prepare").mark_done({})
    stage_directory(recipe, "prepare_sft").mark_done({})
    with pytest.raises(UserError, match=r"stage sft ended with status 1.*submit the same command again"):
        pipeline.run_pipeline(recipe, QUICKSTART, [], jobs)
    assert (tmp_path / "started").read_text().split() == ["extend", "pretrain", "sft"]


def test_a_stopped_pipeline_stops_its_stage(tmp_path: Path):
    script = "import signal; print('runs', flush=True); signal.pause()"
    code = (
        "import signal, subprocess, sys\nfrom ultralong_ray.pipeline import _run\n"
        "def stop(*_): raise KeyboardInterrupt\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "class Told(subprocess.Popen):\n"
        "    def wait(self, timeout=None):\n"
        "        print('waits', flush=True)\n"
        "        return super().wait(timeout)\n"
        "subprocess.Popen = Told\n"
        f"_run([sys.executable, '-c', {script!r}])"
    )
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert {process.stdout.readline() for _ in range(2)} == {"runs\n", "waits\n"}
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_SECONDS)  # ends when the stage, which holds the pipe too, is gone


def test_a_stage_that_is_told_as_well_saves_in_peace():
    """`ray job stop` sends SIGTERM to the pipeline and to its stage, and the pipeline tells the stage once more."""
    script = (
        "import threading, time\nfrom ultralong_ray.train.preemption import _on_sigterm\n"
        "heard = threading.Event()\n_on_sigterm(heard, threading.Event(), 60.0)\nprint('training', flush=True)\n"
        "heard.wait(); time.sleep(1); print('saved', flush=True)"
    )
    code = (
        "import signal, sys\nfrom ultralong_ray.pipeline import _run\n"
        "def stop(*_): raise KeyboardInterrupt\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"_run([sys.executable, '-c', {script!r}])"
    )
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "training\n"
        os.killpg(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == "saved\n"
