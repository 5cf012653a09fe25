"""InfiniteBench's twelve metrics, with their quirks.

In go a task, an answer and the label; out comes a score from 0 to 1. Follows OpenBMB/InfiniteBench @ 88b3daa6,
src/compute_scores.py; every rule here is that file's, however odd, since published numbers depend on it. What differs:
a number that raises there scores 0 here (math_find: a decimal for an integer, and as in math_calc, more digits than
Python converts); a label of kv_retrieval may be a list, which never matches there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ultralong_ray.eval.tasks.f1 import f1, normalised, normalised_chinese
from ultralong_ray.eval.tasks.rouge import rouge_lsum

_MARKS = "\n:\"'.,?!{}"


def _first(label: Any) -> Any:
    return label[0] if isinstance(label, list | tuple) else label


def _with_spaces(text: str, marks: str | tuple[str, ...]) -> str:
    for mark in marks:
        text = text.replace(mark, " ")
    return text


def _single_spaced(text: str) -> str:
    return re.sub(" {2,}", " ", text)


def first_digits(prediction: str) -> str:
    """The first run of digits, "" when there is none."""
    match = re.search("[0-9]+", prediction)
    return match.group() if match else ""


def digits(prediction: str, label: Any) -> bool:
    """passkey, number_string: compared as text, so leading zeros count."""
    return _first(label) == first_digits(prediction)


def value_among_words(prediction: str, label: Any) -> bool:
    """kv_retrieval: the value is one of the words, case included."""
    return _first(label) in _with_spaces(prediction, _MARKS).split()


def last_integer(prediction: str, label: Any) -> bool:
    """code_run: the last word is the number. A full stop ends a word, so 12.0 is 0."""
    words = _with_spaces(prediction.strip(), "\n.`'\":").split()
    try:
        return bool(words) and int(words[-1]) == _first(label)
    except ValueError:
        return False


def debug_option(prediction: str, label: Any) -> bool:
    """code_debug; label = [function, letter]. A bare letter is wrong: `A.`, `A:` or an announced answer is needed."""
    function, letter = label[:2]
    text = prediction.strip()
    if text[:2] in (f"{letter}.", f"{letter}:"):
        return True
    text = _single_spaced(_with_spaces(text, ("\n", "`", "'", '"', "-", "*", "Option", "option")))
    for announced in ("answer is:", "is:", "answer:", "correct option is:"):
        if announced in text:
            return _begins(text[text.find(announced) + len(announced) :], (letter, function))
    return False


def _begins(after: str, choices: Sequence[str]) -> bool:
    """Whether one of the choices follows an announcement; one character, usually a space, is skipped."""
    return after != "" and after[1:].startswith(tuple(choices))


def choice_option(prediction: str, label: Any) -> bool:
    """longbook_choice_eng; label = [text, letter]. A first character A to D decides, even in `Because ...`."""
    text = prediction.strip()
    if not text:
        return False
    if text[0] in "ABCD":
        return text[0] in label
    if text in label:
        return True
    text = _single_spaced(_with_spaces(text, "\n\"'.,?!{}"))
    for announced in ("answer is:", "answer:", "answer is", "option is"):
        if announced in text:
            return _begins(text[text.find(announced) + len(announced) :], label)
    # any substring of "ABCD" counts as a letter there, so "AB" decides as well
    letters = [word for word in text.split() if word in "ABCD"]
    return bool(letters) and letters[0] in label


def found_number(prediction: str, label: Any) -> bool:
    """math_find: the first number without its sign. `label` is an int or a float."""
    wanted = _first(label)
    match = re.search(r"\d+\.\d+|\d+", prediction)
    if match is None:
        return False
    return float(match.group()) == wanted if isinstance(wanted, float) else _integer(match.group()) == wanted


def _integer(text: str) -> int | None:
    """None for a decimal, and for a number of thousands of digits, which a model that repeats itself may write."""
    try:
        return int(text)
    except ValueError:
        return None


def calculated_values(prediction: str, label: Any, template: str) -> float:
    """math_calc: share of the leading intermediate values that are right; signs and points separate numbers.

    With the gpt4 prompts the first number is dropped, since that model repeats the first term.
    """
    wanted = label[0] if isinstance(label[0], list | tuple) else label
    given = re.findall("[0-9]+", prediction)[template == "gpt4" :]
    right = 0
    for value, run in zip(wanted, given, strict=False):
        if value != _integer(run):
            break
        right += 1
    return right / len(wanted)


def speaker(prediction: str, label: Any) -> bool:
    """longdialogue_qa_eng: the name is one of the words in capitals, so a name of two words is never found."""
    return label[0] in _with_spaces(prediction.strip(), _MARKS).upper().split()


def english_answer(prediction: str, label: Any) -> float:
    """longbook_qa_eng: the best token F1 over the labels (the README calls it ROUGE)."""
    return max((f1(normalised(prediction).split(), normalised(one).split()) for one in label), default=0.0)


def chinese_answer(prediction: str, label: Any) -> float:
    """longbook_qa_chn: the same with every character a token."""
    return max((f1(normalised_chinese(prediction), normalised_chinese(one)) for one in label), default=0.0)


def summary(prediction: str, label: Any) -> float:
    """longbook_sum_eng: rougeLsum, lines being sentences."""
    return rouge_lsum(prediction, [label] if isinstance(label, str) else label)


SCORERS: dict[str, Callable[[str, Any], float]] = {
    "passkey": digits,
    "number_string": digits,
    "kv_retrieval": value_among_words,
    "longbook_sum_eng": summary,
    "longbook_choice_eng": choice_option,
    "longbook_qa_eng": english_answer,
    "longbook_qa_chn": chinese_answer,
    "longdialogue_qa_eng": speaker,
    "math_find": found_number,
    "code_run": last_integer,
    "code_debug": debug_option,
}


def infinitebench_score(task: str, prediction: str, label: Any, template: str) -> float:
    """Score of one answer, 0 to 1. `label` is the official one: a text or number, or a list of them."""
    if task == "math_calc":
        return calculated_values(prediction, label, template)
    return float(SCORERS[task](prediction, label))
