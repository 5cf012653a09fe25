"""Files of the standard tests: a folder and a name in, the rows of the test and of its few-shot examples out.

    <folder>/gsm8k/{train,test}.jsonl          question, answer
    <folder>/mmlu/{dev,test}.jsonl             subject, question, choices, answer (0 to 3)
    <folder>/mmlu_pro/{validation,test}.jsonl  category, question, options, answer (A to J), cot_content; validation,
                                               whose cot_content is the worked example, is optional
    <folder>/math/test.jsonl                   problem, solution with \\boxed{answer}; type or subject
    <folder>/humaneval/HumanEval.jsonl         prompt, entry_point, test

each also as `.jsonl.gz`. The forms are those of the sets' own repositories and Hugging Face pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ultralong_ray.eval.tasks.reading import read_rows, text_field
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

TEXTS = {
    "gsm8k": ("question", "answer"),
    "mmlu": ("subject", "question"),
    "mmlu_pro": ("category", "question", "answer"),
    "math": ("problem", "solution"),
    "humaneval": ("prompt", "entry_point", "test"),
}
OTHERS = {"mmlu": ("choices", "answer"), "mmlu_pro": ("options",)}
TEST_FILE = {"humaneval": "HumanEval"}
FEW_SHOT_FILE = {"gsm8k": "train", "mmlu": "dev", "mmlu_pro": "validation"}
OPTIONAL = {"mmlu_pro"}  # few-shot files
MAX_OPTIONS = 10  # of a question of MMLU-Pro


@dataclass(frozen=True, slots=True)
class Row:
    """One question. `index` is its row of the file, `place` its position among the rows asked of its subject."""

    subject: str
    index: int
    place: int
    fields: dict[str, Any]


def standard_rows(test: str, folder: Location, limit: int | None) -> list[Row]:
    """The rows of a test, subject by subject; with `limit` the first ones of every subject, as the harness's --limit.

    Raises: UserError for an absent file or a bad line, which it names.
    """
    rows = _read(test, _file(test, folder, TEST_FILE.get(test, "test")), few_shot=False)
    first_seen = {subject: number for number, subject in enumerate(dict.fromkeys(map(_subject, rows)))}
    placed: Counter[str] = Counter()
    asked = []
    for index, fields in enumerate(rows):
        subject = _subject(fields)
        if limit is None or placed[subject] < limit:
            asked.append(Row(subject, index, placed[subject], fields))
            placed[subject] += 1
    return sorted(asked, key=lambda row: first_seen[row.subject])


def few_shot_rows(test: str, folder: Location) -> list[dict[str, Any]]:
    """Worked examples of a test, of all subjects; none where the test has none. Raises as `standard_rows`."""
    if test not in FEW_SHOT_FILE:
        return []
    name = FEW_SHOT_FILE[test]
    if test in OPTIONAL and not any((folder / test / f"{name}{end}").exists() for end in (".jsonl", ".jsonl.gz")):
        return []
    return _read(test, _file(test, folder, name), few_shot=True)


def examples_of(few_shot: Sequence[dict[str, Any]], subject: str) -> list[dict[str, Any]]:
    """Those of a subject, with blanks or underscores in its name, and those that are of every subject."""
    return [row for row in few_shot if _spelled(row.get("subject") or row.get("category")) in ("", _spelled(subject))]


def _spelled(subject: Any) -> str:
    return str(subject or "").replace(" ", "_")  # the files of one test do not always agree


def check_examples(
    test: str, folder: Location, rows: Sequence[Row], few_shot: Sequence[dict[str, Any]], num_fewshot: int
) -> None:
    """Raises: UserError for a subject of `rows` with too few examples in a few-shot file that is there."""
    for subject in dict.fromkeys(row.subject for row in rows) if few_shot else ():
        found = len(examples_of(few_shot, subject))
        if found < num_fewshot:
            file = _file(test, folder, FEW_SHOT_FILE[test])
            raise UserError(
                f"{file}: {found} examples{f' of {subject!r}' if subject else ''}, and num_fewshot asks for "
                f"{num_fewshot}; add examples, correct the subject, or lower num_fewshot"
            )


def _subject(fields: dict[str, Any]) -> str:
    """Rows without a subject are of one."""
    return str(fields.get("subject") or fields.get("category") or fields.get("type") or "")


def _file(test: str, folder: Location, name: str) -> Location:
    candidates = [folder / test / f"{name}{end}" for end in (".jsonl", ".jsonl.gz")]
    found = next((file for file in candidates if file.exists()), None)
    if found is None:
        raise UserError(
            f"evaluate.tasks: {test} needs {candidates[0]} (or .jsonl.gz), and there is none; put it there, correct "
            f"data_folder, or take {test} out of names"
        )
    return found


def _read(test: str, file: Location, *, few_shot: bool) -> list[dict[str, Any]]:
    texts = TEXTS[test]
    rows = read_rows(
        file, (*texts, *OTHERS.get(test, ()), *(("cot_content",) if few_shot and test == "mmlu_pro" else ()))
    )
    for number, row in enumerate(rows, start=1):
        where = f"{file}: row {number}"
        for name in texts:
            text_field(row, name, where)
        _check(test, row, where)
        if test == "gsm8k" and not few_shot and "####" not in row["answer"]:
            raise UserError(f"{where}: answer has no #### with the number; mend or remove the line")
    return rows


def _check(test: str, row: dict[str, Any], where: str) -> None:
    """Raises: UserError for a value that no question of the test can have."""
    if test == "mmlu":
        _choices(row["choices"], where, "choices", exactly=4)
        if type(row["answer"]) is not int or not 0 <= row["answer"] <= 3:  # True and 1.0 are equal to 1
            raise UserError(f"{where}: answer must be 0, 1, 2 or 3, not {row['answer']!r}; mend the line")
    elif test == "mmlu_pro":
        _choices(row["options"], where, "options")
        if row["answer"] not in tuple("ABCDEFGHIJ"[: len(row["options"])]):
            raise UserError(f"{where}: answer {row['answer']!r} names none of the options; mend the line")
    elif test == "math":
        start = row["solution"].rfind("\\boxed")
        opened = row["solution"][start + len("\\boxed") :] if start >= 0 else ""
        if not opened.startswith(("{", " ")) or (opened[0] == "{" and not _closes(opened)):
            raise UserError(f"{where}: solution has no \\boxed{{...}} with the answer; mend or remove the line")


def _closes(text: str) -> bool:
    """Whether the brace with which `text` begins is closed."""
    depth = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return True
    return False


def _choices(value: Any, where: str, name: str, exactly: int | None = None) -> None:
    texts: Sequence[Any] = value if isinstance(value, list) else []
    fits = len(texts) == exactly if exactly else 2 <= len(texts) <= MAX_OPTIONS
    if not fits or not all(isinstance(text, str) for text in texts):
        wanted = str(exactly) if exactly else f"2 to {MAX_OPTIONS}"
        raise UserError(f"{where}: {name} must be a list of {wanted} texts; mend the line")
