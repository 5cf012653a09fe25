"""jobs/evaluate.py and jobs/report.py on the shipped model and real benchmark files: the numbers are the harness's."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ultralong_ray.eval.generate import Engine

lm_eval = pytest.importorskip("lm_eval", reason="the eval extra is not installed")

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "jobs" / "models" / "tiny-512"
BENCHMARKS = ROOT.parent / "shared" / "data" / "benchmarks"
TASK_FILES = Path(lm_eval.__file__).parent / "tasks"
NEW_TOKENS = 24
SHOTS = 5
ROWS = 3  # of a test
SUBJECT_ROWS = 1  # of each subject of MMLU and MMLU-Pro
WINDOW_TOKENS = 16384  # what the harness's own model may read before it would cut a prompt

pytestmark = [
    pytest.mark.skipif(not BENCHMARKS.exists(), reason=f"needs the benchmark files in {BENCHMARKS}"),
    pytest.mark.slow,
]

RECIPE = """
name = "standard"
workdir = "{workdir}"

[model]
base = "{model}"
original_context_length = 512
base_context_length = 512
target_context_length = 4096
rope = {{ scheme = "llama3", factor = 8.0 }}

[[corpus.sources]]
kind = "installed"

[prepare]
sequence_length = 4096
token_budget = 40960

[pretrain]
global_batch_sequences = 1
learning_rate = 1e-4

[evaluate]
models = ["base"]
passkey = false
chat_template = false
samples_per_shard = 20

[[evaluate.tasks]]
kind = "standard"
names = ["mmlu", "mmlu_pro"]
data_folder = "{benchmarks}"
limit = {subject_rows}
num_fewshot = {shots}
max_new_tokens = {new_tokens}

[[evaluate.tasks]]
kind = "standard"
names = ["humaneval"]
data_folder = "{benchmarks}"
limit = {rows}
max_new_tokens = {new_tokens}
allow_code_execution = true

[[evaluate.tasks]]
kind = "standard"
names = ["gsm8k"]
data_folder = "{benchmarks}"
chat_template = true
limit = {rows}
num_fewshot = {shots}
max_new_tokens = {new_tokens}

[[evaluate.tasks]]
kind = "standard"
names = ["math"]
data_folder = "{made}"
limit = {rows}
max_new_tokens = {new_tokens}
"""


def job(script: str, recipe: Path) -> None:
    """The real command, with a Ray of its own below a folder of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="ulr") as folder:  # short: Ray's socket paths are limited
        more = {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": folder, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, f"jobs/{script}.py", str(recipe)]
        done = subprocess.run(command, cwd=ROOT, env={**kept, **more}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def rows_of(file: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in text.decode().split("\n") if line.strip()]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def write_math(folder: Path) -> None:
    """MATH's form, questions of our own; the second answer is what the model says, so that one of them is right."""
    engine = Engine(MODEL, precision="float32", prefill_chunk_tokens=512, device="cpu")
    questions = ["What is $1+1$?", "Half of 6?", "Solve $2x = 8$ for $x$.", "Never asked?"]
    asked = engine.tokenizer(f"Problem: {questions[1]}\nAnswer:")["input_ids"]
    said = engine.answer(asked, NEW_TOKENS, ("Problem:",), exact=True)
    answers = ["2", said, "4", "0"]
    rows = [
        {"problem": question, "solution": f"It is $\\boxed{{{answer}}}$.", "type": "Algebra", "level": "Level 1"}
        for question, answer in zip(questions, answers, strict=True)
    ]
    write_rows(folder / "math" / "test.jsonl", rows)


def task_files(folder: Path, made: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(test, harness's task file, what a YAML beside it changes) of every subject, with the rows as it reads them."""
    mmlu, dev = rows_of(BENCHMARKS / "mmlu/test.jsonl.gz"), rows_of(BENCHMARKS / "mmlu/dev.jsonl.gz")
    for subject in dict.fromkeys(row["subject"] for row in mmlu):
        asked, shown = ([row for row in rows if row["subject"] == subject] for rows in (mmlu, dev))
        own = {
            "test": write_rows(folder / f"{subject}.jsonl", asked[:SUBJECT_ROWS]),
            "dev": write_rows(folder / f"{subject}-dev.jsonl", shown),
        }
        yield "mmlu", f"mmlu/default/mmlu_{subject}.yaml", {"files": own, "num_fewshot": SHOTS}
    pro = rows_of(BENCHMARKS / "mmlu_pro/test.jsonl.gz")
    names = ("question", "options", "answer", "category")
    for category in dict.fromkeys(row["category"] for row in pro):
        first = [{name: r[name] for name in names} for r in pro if r["category"] == category][:SUBJECT_ROWS]
        file = write_rows(folder / f"{category}-pro.jsonl", first)
        # there is no file of worked examples, so none are shown
        own = {"files": {"test": file, "validation": file}, "num_fewshot": 0}
        yield "mmlu_pro", f"mmlu_pro/mmlu_pro_{category.replace(' ', '_')}.yaml", own
    gsm8k = {split: str(BENCHMARKS / f"gsm8k/{split}.jsonl") for split in ("train", "test")}
    yield "gsm8k", "gsm8k/gsm8k.yaml", {"files": gsm8k, "num_fewshot": SHOTS}
    humaneval = {"test": str(BENCHMARKS / "humaneval/HumanEval.jsonl.gz")}
    yield "humaneval", "humaneval/humaneval.yaml", {"files": humaneval}
    math = {"files": {"test": str(made / "math/test.jsonl")}, "training_split": None}
    yield "math", "hendrycks_math/hendrycks_math_algebra.yaml", math


class CodeEval:
    """Stands in for the Hub's `code_eval`, which needs a network: a program passes when Python runs it to its end."""

    def compute(self, references: list[str], predictions: list[list[str]], k: list[int]) -> tuple[Any, None]:
        programs = [f"{one}\n{test}" for each, test in zip(predictions, references, strict=True) for one in each]
        ends = [subprocess.run([sys.executable, "-c", text], capture_output=True, timeout=30) for text in programs]
        return {"pass@1": sum(end.returncode == 0 for end in ends) / len(ends)}, None


def harness(folder: Path, made: Path, test: str) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """(task, its results, its samples) by the harness alone: its files, its reader, its own model class on CPU."""
    import yaml
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = []
    for which, file, changes in task_files(folder / "rows", made):
        if which != test:
            continue
        name = f"local_{Path(file).stem}"
        own = {"task": name, "dataset_path": "json", "dataset_name": None, "include": str(TASK_FILES / file)}
        own |= {"dataset_kwargs": {"data_files": changes.pop("files")}, "tag": None, **changes}
        (folder / "tasks").mkdir(exist_ok=True)
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(own))
        names.append(name)
    results: Any = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(MODEL), "dtype": "float32", "max_length": WINDOW_TOKENS},
        device="cpu",
        batch_size=1,
        tasks=names,
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        limit=ROWS,
        gen_kwargs=None if test == "mmlu" else {"max_gen_toks": NEW_TOKENS},
        apply_chat_template=test == "gsm8k",
        fewshot_as_multiturn=test == "gsm8k",
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
    )
    return [(name, results["results"][name], results["samples"][name]) for name in names]


METRICS = {
    "mmlu": "acc,none",
    "mmlu_pro": "exact_match,custom-extract",
    "gsm8k": "exact_match,flexible-extract",
    "humaneval": "pass@1,create_test",
    "math": "exact_match,none",
}


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the run and its report.json."""
    folder = tmp_path_factory.mktemp("standard")
    write_math(folder / "made")
    values = {"workdir": folder / "run", "model": MODEL, "benchmarks": BENCHMARKS, "made": folder / "made"}
    numbers = {"rows": ROWS, "subject_rows": SUBJECT_ROWS, "shots": SHOTS, "new_tokens": NEW_TOKENS}
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(**values, **numbers))
    job("evaluate", recipe)
    job("report", recipe)
    (file,) = (folder / "run").glob("report-*/report.json")
    return folder, json.loads(file.read_text())


@pytest.mark.parametrize("test", METRICS)
def test_the_reports_number_is_the_harnesses(
    reported: tuple[Path, dict[str, Any]], tmp_path: Path, test: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.setattr(evaluate, "load", lambda name: CodeEval())
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, report = reported
    (suite,) = report["benchmarks"]["suites"]
    (score,) = next(row for row in suite["models"][0]["rows"] if row["name"] == test)["scores"]
    theirs = harness(tmp_path, folder / "made", test)
    counted = [(result[METRICS[test]], len({s["doc_id"] for s in samples})) for _, result, samples in theirs]
    assert score["num_samples"] == sum(count for _, count in counted)
    mean = sum(value * count for value, count in counted) / score["num_samples"]
    assert score["percent"] == pytest.approx(100 * mean, abs=1e-9)
    assert test not in ("mmlu", "math") or 0 < score["percent"] < 100, "some are right and some are wrong"

    stored = [row for file in score["files"] for row in json.loads((folder / "run" / file).read_text())["samples"]]
    for row, (prompt, answer) in zip(stored, asked_and_said(theirs), strict=True):
        assert row["prompt_end"] == prompt[-400:]
        assert row["answer"] == answer
    page = next((folder / "run").glob("report-*/report.html")).read_text()
    assert f">{score['percent']:.1f}</a>" in page


def asked_and_said(theirs: list[tuple[str, dict[str, Any], list[dict[str, Any]]]]) -> Iterator[tuple[str, str]]:
    """Prompt and answer of every row: what the model wrote, or the choice that it found likeliest."""
    for _, _, samples in theirs:
        rows = {sample["doc_id"]: sample for sample in samples}
        for number in sorted(rows):
            responses = [response[0] for response in rows[number]["resps"]]
            if not isinstance(responses[0], str):
                best = max(range(len(responses)), key=lambda i: responses[i][0])
                yield rows[number]["arguments"][best][0], rows[number]["arguments"][best][1].strip()
            else:
                yield rows[number]["arguments"][0][0], responses[0]
