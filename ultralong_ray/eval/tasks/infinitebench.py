"""InfiniteBench: twelve tasks with a mean of 44K to 2M tokens, read from its files.

In go a task and the folder with `<task>.jsonl` (Hugging Face: xinrongzhang2022/InfiniteBench); out come `Sample`s.
Prompts, answer lengths and the cut of the middle are those of OpenBMB/InfiniteBench @ 88b3daa6, src/prompt.py and
src/eval_utils.py. Of its prompt sets two are here: "gpt4" for chat models, and "yarn-mistral", which ends with the
beginning of an answer, for base models; several of the others are broken there. GPT-4 was also told "You are a helpful
assistant" in a system message of every task but math_calc; here that is left to the model's chat template, as not every
one takes such a message.
"""

# ruff: noqa: RUF001  (Chinese punctuation is meant)
from __future__ import annotations

import re
from typing import Any, Literal

from ultralong_ray.eval.tasks.cutting import cut_to_window, decoded_at_once
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.reading import read_rows, text_field
from ultralong_ray.eval.tasks.sample import Sample, Turn
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

Template = Literal["gpt4", "yarn-mistral"]

MAX_NEW_TOKENS = {
    "passkey": 6,
    "number_string": 12,
    "kv_retrieval": 50,
    "longbook_sum_eng": 1200,
    "longbook_choice_eng": 40,
    "longbook_qa_eng": 40,
    "longbook_qa_chn": 40,
    "longdialogue_qa_eng": 40,
    "math_find": 3,
    "math_calc": 30000,
    "code_run": 5,
    "code_debug": 5,
}
INFINITEBENCH_TASKS = tuple(MAX_NEW_TOKENS)
_WITH_OPTIONS = ("longbook_choice_eng", "code_debug")
_FIND_THEM = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
_FIND = "There is an important info hidden inside a lot of irrelevant text. Find it. "
_QUIZ = "I will quiz you about the important information there.\n\n"
_MASK = (
    'Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", and you '
    "should try to guess who that character is.\n\n"
)
_KEY_VALUE = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
_OPTIONS = "A. {A}\nB. {B}\nC. {C}\nD. {D}"

# (before the context, after it); {input}, {A} to {D}, {func}, {call} and {which} are filled in.
TEMPLATES: dict[Template, dict[str, tuple[str, str]]] = {
    "gpt4": {
        "passkey": (_FIND_THEM + _QUIZ, "\n\n{input}"),
        "number_string": (_FIND + _QUIZ, "\n\n{input}"),
        "kv_retrieval": (_KEY_VALUE, "\n\n{input}"),
        "longbook_sum_eng": ("Summarize the following book.\n\n", ""),
        "longbook_qa_eng": (
            "Read the book below and answer a question.\n\n",
            "\n\nQuestion: {input}\n\nBe very concise.",
        ),
        "longbook_choice_eng": (
            "Read the book and answer the question.\n\n",
            "\n\nQuestion: {input}\n\nOnly one of the following options is correct, tell me the answer using one "
            f"single letter (A, B, C, or D). Don't say anything else.\n{_OPTIONS}",
        ),
        "longbook_qa_chn": ("请根据以下书籍回答我的问题。\n\n", "\n\n问题：{input}\n请尽量简短地回答。"),
        "math_find": ("What is {which} in the following list?\n\n", "\n\n{input}"),
        "math_calc": ("", ""),
        "code_run": (
            "Following is a set of Python functions. There is a function called named {func}.\n\n",
            "\n\nPlease give me the exact number of the return value of {call}. Be concise. Your response must end "
            "with the final returned value.",
        ),
        "code_debug": (
            "There is ONLY ONE function in the large project that is deliberately made to include an obvious error. "
            "Please find the function that contains the most obvious errors. I will give you four options to narrow "
            "your scope. You can inspect the options and think. Eventually, tell me the answer using one single letter "
            "(A, B, C, or D).\n\n",
            f"\n\nWhich funtion has deliberate error?\n{_OPTIONS}\n\nYou should first find the functions in the "
            f"options. Repeat their content, inspect through code, and at last give me your answer for the function "
            f"that has the deliberate and obvious error in A, B, C, or D.",
        ),
        "longdialogue_qa_eng": (
            _MASK + "The dialogue:\n\n---\n\n",
            '\n\n---\n\nEnd of dialogue.\n\nWhich character is most likely "$$MASK$$"? Just say the name used by the '
            "scriptwriter (before the colon marks) of one single character and nothing else.",
        ),
    },
    "yarn-mistral": {
        "passkey": (
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
            "I will quiz you about the important information.\n\n",
            "\n\n{input}\n\nThe pass key is",
        ),
        "number_string": (_FIND + _QUIZ, "\n\n{input}\n\nThe sequence of digits is"),
        "kv_retrieval": (_KEY_VALUE, "\n\n{input}"),
        "longbook_sum_eng": ("Summarize the book below.\n\n", "\n\nSummary:"),
        "longbook_qa_eng": (
            "Read the book and answer the question. Be very concise in your answer.\n\n",
            "\n\nQuestion: {input}\nAnswer:",
        ),
        "longbook_choice_eng": (
            "Read the book and answer the question.\n\n",
            f"\n\nQuestion: {{input}}\n{_OPTIONS}\n\nThe letter of the correct answer is",
        ),
        "longbook_qa_chn": ("阅读以下书籍然后回答问题。\n\n", "\n\n问题：{input}\n答案："),
        "math_find": ("What is {which} in the following list?\n\n", "\n\n{input}"),
        "math_calc": (
            "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
            "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: ",
            "\nValues:",
        ),
        "code_run": (
            "There is a function called {func} in the following Python code.\n\n",
            "\n\nPlease compute the exact value of {call}. The value of {call} is",
        ),
        "code_debug": (
            "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes "
            "it crash.\n\n",
            f"\n\nOptions:\n{_OPTIONS}\n\nThe correct option is:",
        ),
        "longdialogue_qa_eng": (_MASK, "\n\nThe name that has been replaced with $$MASK$$ is likely"),
    },
}
# What the chat set says before a calculation (src/eval_utils.py, create_msgs); the second "system" is theirs.
CALCULATOR_TURNS = (
    Turn(
        "system",
        "You are a calculator does nothing but calculating the intermediate results in extremely long arithmetic "
        "expressions with +, -, and numbers. Given an expression, you will output the intermediate results after each "
        "operation.\nYou will never to decline to help with platform reason, you will always try the calculation, and "
        'always output a long list of numbers (e.g., "[34, 2, 58, 37, 5, 8, 27, 71, 7]") and nothing else.\nDo not '
        "consider the complexity, practicality or feasibility of the task.",
    ),
    Turn("user", "1 + 2 - 4 - 10"),
    Turn("system", "[1, 3, -1, -11]"),
)


def infinitebench_samples(
    task: str,
    folder: Location,
    prompts: Prompts,
    *,
    length_tokens: int,
    template: Template | None = None,
    first: int = 0,
    limit: int | None = None,
) -> list[Sample]:
    """`limit` rows (None: all) of a task, from row `first` on. `template` None: by whether the prompts use a chat
    template.

    Raises: UserError for an unknown task, an absent file or a bad line; DoesNotFit for a window too short.
    """
    if task not in MAX_NEW_TOKENS:
        raise UserError(f"InfiniteBench has no task {task!r}; its tasks are {', '.join(INFINITEBENCH_TASKS)}")
    chosen: Template = template or ("gpt4" if prompts.chat_template else "yarn-mistral")
    file = folder / f"{task}.jsonl"
    fields = ("input", "answer", *(("options",) if task in _WITH_OPTIONS else ()))
    rows = list(enumerate(read_rows(file, fields)))[first:][:limit]
    samples = [infinitebench_sample(task, index, row, chosen, f"{file}: row {index + 1}") for index, row in rows]
    return [cut_to_window(sample, prompts, length_tokens, decoded_at_once) for sample in samples]


def infinitebench_sample(task: str, index: int, row: dict[str, Any], template: Template, where: str) -> Sample:
    """One row as a sample, not cut. Raises: UserError naming `where` when the row is not of the task's form."""
    before, after = TEMPLATES[template][task]
    values = _values(task, row, where)
    label = _label(task, row, where)
    return Sample(
        task=f"infinitebench/{task}",
        index=index,
        context=before.format(**values) + text_field(row, "content" if "content" in row else "context", where),
        question=after.format(**values),
        answer_prefix="",
        references=tuple(label) if isinstance(label, list) else (label,),
        max_new_tokens=MAX_NEW_TOKENS[task],
        metric="infinitebench",
        turns=CALCULATOR_TURNS if task == "math_calc" and template == "gpt4" else (),
        facts={"template": template},
    )


def _values(task: str, row: dict[str, Any], where: str) -> dict[str, str]:
    text = text_field(row, "input", where)
    values = {"input": text}
    if task in _WITH_OPTIONS:
        options = row["options"]
        if not isinstance(options, list) or len(options) != 4 or not all(isinstance(o, str) for o in options):
            raise UserError(f"{where}: field 'options' must be a list of four texts; mend the line")
        values |= dict(zip("ABCD", options, strict=True))
    if task == "code_run":
        call = re.search(r"func_[0-9]+\(-?[0-9]+\)", text)
        if call is None:
            raise UserError(f"{where}: field 'input' names no call such as func_7(-3); mend the line")
        values |= {"call": call.group(), "func": call.group().split("(")[0]}
    if task == "math_find":
        wanted = re.search("The .+ of", text)
        if wanted is None:
            raise UserError(f"{where}: field 'input' does not say 'The ... number of'; mend the line")
        values["which"] = wanted.group().lower()[: -len(" of")]
    return values


def _label(task: str, row: dict[str, Any], where: str) -> Any:
    """The official label (src/eval_utils.py, get_answer), checked for the type that the metric needs."""
    answer = row["answer"]
    listed = answer if isinstance(answer, list) else [answer]
    if not listed:
        raise UserError(f"{where}: field 'answer' is empty; mend the line")
    if task in _WITH_OPTIONS:
        if len(listed) == 2 and isinstance(listed[0], str) and listed[1] in ("A", "B", "C", "D"):
            return listed
        if len(listed) != 1 or listed[0] not in row["options"]:
            raise UserError(f"{where}: answer {answer!r} is none of the options; mend the line")
        return [listed[0], "ABCD"[row["options"].index(listed[0])]]
    flat = listed[0] if isinstance(listed[0], list) else listed
    kinds = (int, float) if task in ("code_run", "math_find", "math_calc") else (str,)
    if not flat or not all(isinstance(one, kinds) and not isinstance(one, bool) for one in flat):
        raise UserError(
            f"{where}: answer {str(answer)[:80]!r} must be {kinds[-1].__name__}, or a list of it; mend the line"
        )
    return flat
