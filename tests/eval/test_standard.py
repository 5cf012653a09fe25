"""Standard tests: the numbers are those of lm-evaluation-harness with its own model class and its own data path."""

# The harness is an optional extra.
# pyright: reportMissingImports=false
from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from ultralong_ray.config import EvaluateConfig
from ultralong_ray.config.read_tasks import StandardTask
from ultralong_ray.eval.cells import grid, run_cell
from ultralong_ray.eval.engine import Request
from ultralong_ray.eval.generate import Engine
from ultralong_ray.eval.making import Maker
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.storage import Location
from ultralong_ray.types import CellResult, UserError

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'ultralong-ray[eval]'")

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
MODEL = ROOT / "jobs" / "models" / "tiny-512"
NAMES = ("gsm8k", "mmlu", "mmlu_pro", "math", "humaneval")
SUBJECTS = ("anatomy", "virology")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(MODEL, precision="float32", prefill_chunk_tokens=512, device="cpu")


def lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_files(folder: Path) -> Path:
    """Two to six short questions of every test."""

    def sum_of(i: int) -> dict[str, Any]:
        return {"question": f"What is {i} + {i + 1}?", "answer": f"It is {2 * i + 1}.\n#### {2 * i + 1}"}

    lines(folder / "gsm8k" / "train.jsonl", map(sum_of, range(20, 32)))
    lines(folder / "gsm8k" / "test.jsonl", map(sum_of, range(5)))

    def choice(subject: str, i: int) -> dict[str, Any]:
        choices = [str(i + j) for j in range(4)]
        return {"subject": subject, "question": f"{subject} {i}?", "choices": choices, "answer": i % 4}

    lines(folder / "mmlu" / "dev.jsonl", [choice(s, i) for s in SUBJECTS for i in range(10, 13)])
    lines(folder / "mmlu" / "test.jsonl", [choice(s, i) for i in range(4) for s in SUBJECTS])

    def option(category: str, i: int) -> dict[str, Any]:
        row = {"question": f"{category} {i}?", "options": ["x", "y", "z"], "answer": "ABC"[i % 3], "category": category}
        return {**row, "cot_content": f"A: Let's think step by step. The answer is ({'ABC'[i % 3]})."}

    lines(folder / "mmlu_pro" / "validation.jsonl", [option(s, i) for s in ("law", "math") for i in range(3)])
    lines(folder / "mmlu_pro" / "test.jsonl", [option(s, i) for s in ("law", "math") for i in range(2)])
    solution = {"solution": "So $\\boxed{\\frac{1}{2}}$.", "level": "Level 1"}
    lines(folder / "math" / "test.jsonl", [{"problem": f"Half of {i}?", "type": "Algebra", **solution} for i in (1, 2)])
    program = {"prompt": "def one():\n", "entry_point": "one", "test": "def check(f):\n    assert f() == 1\n"}
    lines(folder / "humaneval" / "HumanEval.jsonl", [{**program, "task_id": f"t/{i}"} for i in range(3)])
    return folder


def evaluated(engine: Any, folder: Path, name: str, *, chat: bool = False, shard: int = 3, **more: Any) -> list[Any]:
    """The cells of one test, as the fan-out computes them."""
    section = {"kind": "standard", "names": [name], "data_folder": str(folder), "allow_code_execution": True}
    values = {"max_new_tokens": 8, "num_fewshot": 2, **section, **more}
    config = EvaluateConfig.model_validate(
        {"passkey": False, "tasks": [values], "samples_per_shard": shard, "chat_template": chat}
    )
    maker = Maker({str(folder): Location.of(folder)})
    cells = grid(config, ["final"], None, maker)
    return [
        run_cell(engine, config, cell, maker, lambda chat: Prompts(engine.tokenizer, chat_template=chat))
        for cell in sorted(cells, key=lambda cell: cell.shard)
    ]


def rows_of(results: list[CellResult]) -> list[dict[str, Any]]:
    return [row for result in results for row in result.samples]


def harness(model: Engine, folder: Path, name: str, *, chat: bool, shots: int = 2) -> dict[str, Any]:
    """The harness by itself: its own model class, its own way to read files, all rows of a test at once."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml

    tasks = Path(lm_eval.__file__).parent / "tasks"
    subject = "anatomy" if name == "mmlu" else "law"
    source = {
        "gsm8k": "gsm8k/gsm8k.yaml",
        "mmlu": f"mmlu/default/mmlu_{subject}.yaml",
        "mmlu_pro": f"mmlu_pro/mmlu_pro_{subject}.yaml",
        "math": "hendrycks_math/hendrycks_math_algebra.yaml",
    }[name]
    config = load_yaml(tasks / source)
    files = {file.name.split(".")[0]: str(file) for file in (folder / name).iterdir()}
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    if name == "mmlu":
        config["process_docs"] = lambda data: data.filter(lambda row: row["subject"] == subject)
    if name == "mmlu_pro":
        own = config["process_docs"]
        config["fewshot_config"] = {**config["fewshot_config"], "process_docs": own}
    if name == "math":
        config |= {"training_split": None}
    config["num_fewshot"] = 0 if name == "math" else shots
    if "generation_kwargs" in config:
        config["generation_kwargs"] = {**config["generation_kwargs"], "max_gen_toks": 8}
    wrapped: Any = HFLM
    lm = wrapped(pretrained=model.model, tokenizer=model.tokenizer, batch_size=1, max_length=4096)
    task = config["task"]
    # what simple_evaluate does, without reading every task file of the package and asking about the machine
    made = ConfigurableTask(config={key: value for key, value in config.items() if key != "tag"})
    made.set_fewshot_seed(seed=1234)
    chosen: Any = {"tasks": {task: made}, "groups": {}}
    results: Any = evaluate(lm, chosen, bootstrap_iters=0, apply_chat_template=chat, fewshot_as_multiturn=chat)
    prompts = {sample["doc_id"]: sample["arguments"] for sample in results["samples"][task]}
    return {**results["results"][task], "prompts": [prompts[i][0][0] for i in sorted(prompts)]}


@pytest.mark.parametrize("chat", [False, True])
def test_numbers_are_the_harnesses_own(engine: Engine, tmp_path: Path, chat: bool, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = write_files(tmp_path)
    made_right(engine, folder, chat)
    for name in ("gsm8k", "mmlu", "mmlu_pro", "math"):
        theirs = harness(engine, folder, name, chat=chat)
        ours = rows_of(evaluated(engine, folder, name, chat=chat))
        subject = {"mmlu": "anatomy", "mmlu_pro": "law"}.get(name)
        ours = [row for row in ours if subject in (None, row["subject"])]
        for metric in ours[0]["metrics"]:
            mean = sum(row["metrics"][metric] for row in ours) / len(ours)
            assert mean == pytest.approx(theirs[metric], abs=1e-12), f"{name} {metric}"
        assert [row["prompt_end"] for row in ours] == [prompt[-400:] for prompt in theirs["prompts"]], name
        if not chat and name in ("gsm8k", "math"):
            assert 0 < sum(row["score"] for row in ours) < len(ours), "some are right and some are wrong"


NO_SYSTEM_ROLE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_template_without_a_system_role_is_asked_as_the_harness_does(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = write_files(tmp_path)
    monkeypatch.setattr(engine.tokenizer, "chat_template", NO_SYSTEM_ROLE)
    for name, subject in (("mmlu", "anatomy"), ("mmlu_pro", "law")):
        ours = [row for row in rows_of(evaluated(engine, folder, name, chat=True)) if row["subject"] == subject]
        theirs = harness(engine, folder, name, chat=True)
        assert [row["prompt_end"] for row in ours] == [prompt[-400:] for prompt in theirs["prompts"]], name
    monkeypatch.setattr(engine.tokenizer, "chat_template", "{{ raise_exception('nothing pleases me') }}")
    with pytest.raises(UserError, match=r"nothing pleases me.*chat_template = false"):
        evaluated(engine, folder, "mmlu", chat=True)


def made_right(engine: Engine, folder: Path, chat: bool) -> None:
    """Give some questions the answer that the model gives, so that not all scores are 0."""
    for name, field in (("gsm8k", "answer"), ("math", "solution")):
        file = folder / name / "test.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        said = rows_of(evaluated(engine, folder, name, chat=chat))
        for row, answer in list(zip(rows, said, strict=True))[1::3]:
            digits = "".join(filter(str.isdigit, answer["answer"])) or "7"
            row[field] = f"#### {digits}" if name == "gsm8k" else "$\\boxed{" + answer["answer"] + "}$"
        lines(file, rows)


class Says:
    """An engine that gives the answers it is told to give."""

    def __init__(self, tokenizer: Any, answer: Callable[[Request], str]) -> None:
        self.tokenizer, self._answer = tokenizer, answer
        self.asked: list[Request] = []

    def answers(self, requests: Iterable[Request]) -> list[str]:
        self.asked = list(requests)
        return [self._answer(request) for request in self.asked]


def test_programs_are_judged_by_running_them(engine: Engine, tmp_path: Path) -> None:
    bodies = iter(["    return 1\n", "    return 2\n", "    import socket\n    socket.socket()\n    return 1\n"])
    says = Says(engine.tokenizer, lambda request: next(bodies))
    results = evaluated(says, write_files(tmp_path), "humaneval", shard=2)
    assert [row["score"] for row in rows_of(results)] == [1.0, 0.0, 0.0]
    assert [result.score for result in results] == [0.5, 0.0]


@pytest.mark.parametrize("chat", [False, True])
def test_a_code_block_ends_only_where_the_prompt_opened_one(engine: Engine, tmp_path: Path, chat: bool) -> None:
    """As the harness: `humaneval_instruct` cuts the answer at a closing fence, `humaneval` takes it whole."""
    says = Says(engine.tokenizer, lambda request: "    return 1\n```\nThat is it.")
    rows = rows_of(evaluated(says, write_files(tmp_path), "humaneval", limit=1, chat=chat))
    assert ("```python" in says.asked[0].text) == chat
    assert [row["score"] for row in rows] == [float(chat)]


def test_a_limit_takes_the_first_rows_of_every_subject(engine: Engine, tmp_path: Path) -> None:
    says = Says(engine.tokenizer, lambda request: "")
    results = evaluated(says, write_files(tmp_path), "mmlu_pro", limit=1, num_fewshot=1)
    assert [row["index"] for row in rows_of(results)] == [0, 2]
    assert all(row["num_fewshot"] == 1 for row in rows_of(results))


def test_a_subject_keeps_its_examples_however_its_name_is_written(engine: Engine, tmp_path: Path) -> None:
    file = write_files(tmp_path) / "mmlu_pro" / "validation.jsonl"
    asked = {**json.loads(file.read_text().splitlines()[0]), "category": "computer_science"}
    lines(file, [{**asked, "category": "computer science", "question": f"shown {i}?"} for i in range(2)])
    lines(file.with_name("test.jsonl"), [asked])
    says = Says(engine.tokenizer, lambda request: "")
    (row,) = rows_of(evaluated(says, tmp_path, "mmlu_pro"))
    assert row["num_fewshot"] == 2 and all(f"shown {i}?" in says.asked[0].text for i in range(2))


def test_too_few_examples_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    write_files(tmp_path)
    named: tuple[tuple[Any, str], ...] = (
        ("mmlu", r"mmlu/dev\.jsonl: 3 examples of 'anatomy', and num_fewshot asks for 13"),
        ("gsm8k", r"gsm8k/train\.jsonl: 12 examples, and num_fewshot asks for 13"),
    )
    for name, message in named:
        section = StandardTask(kind="standard", names=(name,), data_folder=str(tmp_path), num_fewshot=13)
        with pytest.raises(UserError, match=message):
            Maker({str(tmp_path): Location.of(tmp_path)}).num_samples(section, f"standard/{name}")
    (tmp_path / "mmlu_pro" / "validation.jsonl").unlink()
    section = StandardTask(kind="standard", names=("mmlu_pro",), data_folder=str(tmp_path))
    assert Maker({str(tmp_path): Location.of(tmp_path)}).num_samples(section, "standard/mmlu_pro") == 4


def test_vectors_of_the_harness(engine: Engine, tmp_path: Path) -> None:
    vectors = SHARED / "vectors" / "standard"
    if not vectors.exists():
        pytest.skip(f"needs {vectors}")
    folder = SHARED / "benchmarks"
    says = Says(engine.tokenizer, lambda request: "")
    evaluated(says, folder, "gsm8k", limit=1, num_fewshot=5)
    prompt = json.loads((vectors / "gsm8k_prompt_doc0.json").read_text())["prompt"]
    assert says.asked[0].text == prompt
    rows = json.loads((vectors / "gsm8k_lm_eval.json").read_text())["rows"]
    lines(tmp_path / "gsm8k" / "train.jsonl", [{"question": "q", "answer": "a"}] * 3)
    lines(tmp_path / "gsm8k" / "test.jsonl", [{"question": "?", "answer": f"#### {row['gold']}"} for row in rows])
    answers = iter([row["pred"] for row in rows])
    found = rows_of(evaluated(Says(engine.tokenizer, lambda _: next(answers)), tmp_path, "gsm8k", shard=100))
    for form in ("strict-match", "flexible-extract"):
        assert [row["metrics"][f"exact_match,{form}"] for row in found] == [row[form] for row in rows]


@pytest.mark.parametrize(
    ("test", "file", "changes", "message"),
    [
        ("mmlu", "test", {"answer": 4}, r"test.jsonl: row 2: answer must be 0, 1, 2 or 3, not 4"),
        ("mmlu", "test", {"answer": 1.0}, r"test.jsonl: row 2: answer must be 0, 1, 2 or 3, not 1.0"),
        ("mmlu", "dev", {"choices": ["a"]}, r"dev.jsonl: row 2: choices must be a list of 4 texts"),
        ("mmlu_pro", "test", {"answer": "D"}, r"row 2: answer 'D' names none of the options"),
        ("math", "test", {"solution": "It is 3."}, r"row 2: solution has no \\boxed"),
        ("gsm8k", "test", {"answer": "It is 3."}, r"row 2: answer has no #### with the number"),
        ("gsm8k", "test", {"question": 3}, r"row 2: field 'question' must be text, not int"),
    ],
)
def test_a_bad_line_is_named(
    engine: Engine, tmp_path: Path, test: str, file: str, changes: dict[str, Any], message: str
) -> None:
    path = write_files(tmp_path) / test / f"{file}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines(path, [rows[0], rows[1] | changes, *rows[2:]])
    with pytest.raises(UserError, match=message):
        evaluated(Says(engine.tokenizer, lambda _: ""), tmp_path, test)


def test_no_program_runs_unless_it_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set allow_code_execution = true"):
        StandardTask(kind="standard", names=("humaneval",), data_folder=str(tmp_path))
    write_files(tmp_path)
    (tmp_path / "gsm8k" / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"gsm8k needs .*train\.jsonl"):
        evaluated(None, tmp_path, "gsm8k")
