"""How one model's prompts are written and measured: its tokenizer, with or without its chat template.

In go a `Sample` or text; out come the whole prompt, its token ids and its token count. `estimate` counts by words and
remembers them, so that a search over prompts of millions of tokens costs about one tokenisation in all. Read against
transformers 5.17 and 5.23 (a fast tokenizer: called with one text or a list, without cutting).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError

from ultralong_ray.eval.tasks.sample import Sample
from ultralong_ray.types import UserError

REMEMBERED_WORDS = 2**21  # ~200 MB; beyond it the memory starts anew
BATCH_WORDS = 2**15  # words of one tokenizer call


class Prompts:
    """Writes and measures prompts. `tokenizer` is a Hugging Face tokenizer or behaves like one."""

    def __init__(self, tokenizer: Any, *, chat_template: bool) -> None:
        """Raises: UserError when the chat template is asked for and the tokenizer has none."""
        if chat_template and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "evaluate.chat_template is true, but the model's tokenizer has no chat template; set it false"
            )
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._word_tokens: dict[str, int] = {}

    def text(self, sample: Sample) -> str:
        """The whole prompt. Without a chat template, earlier turns are written as `User: ...` paragraphs.

        Raises: UserError when the chat template refuses the sample's turns.
        """
        message = sample.context + sample.question
        if self.chat_template:
            turns = [{"role": role, "content": content} for role, content in self.messages(sample)]
            try:
                opened = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            except TemplateError as error:
                raise UserError(_refused(sample, error)) from error
            return opened + sample.answer_prefix
        if not sample.turns:
            return message + sample.answer_prefix
        paragraphs = [f"{turn.role.capitalize()}: {turn.content}" for turn in sample.turns]
        return "\n\n".join([*paragraphs, f"User: {message}", f"Assistant:{sample.answer_prefix}"])

    def messages(self, sample: Sample) -> tuple[tuple[str, str], ...]:
        """(role, content) of the turns that the chat template renders; none without one."""
        if not self.chat_template:
            return ()
        return (*((turn.role, turn.content) for turn in sample.turns), ("user", sample.context + sample.question))

    def ids(self, text: str) -> list[int]:
        """Token ids of a whole prompt. A rendered chat template brings its own BOS, so none is added to it."""
        # verbose=False: the tokenizer's own warning about long texts is expected here and nothing is ever cut
        return self.tokenizer(text, add_special_tokens=not self.chat_template, verbose=False)["input_ids"]

    def measured(self, sample: Sample) -> Sample:
        """The same sample with `prompt_tokens` counted."""
        return replace(sample, prompt_tokens=len(self.ids(self.text(sample))))

    def estimate(self, text: str) -> int:
        """About `len(self.ids(text))`: the sum over the words between spaces, each measured once.

        Exact up to a constant for tokenizers that never join tokens across " x", as all of the GPT and Llama 3 kind.
        """
        words = Counter(text.split(" "))
        unseen = [word for word in words if word not in self._word_tokens]
        if len(self._word_tokens) + len(unseen) > REMEMBERED_WORDS:
            self._word_tokens.clear()
            unseen = list(words)
        for start in range(0, len(unseen), BATCH_WORDS):
            batch = unseen[start : start + BATCH_WORDS]
            encoded = self.tokenizer([" " + word for word in batch], add_special_tokens=False, verbose=False)
            self._word_tokens.update(zip(batch, map(len, encoded["input_ids"]), strict=True))
        return sum(self._word_tokens[word] * count for word, count in words.items())


def _refused(sample: Sample, error: TemplateError) -> str:
    roles = ", ".join([*(turn.role for turn in sample.turns), "user"])
    # of our tasks, only one prompt of InfiniteBench's gpt4 set has system turns
    other = 'template = "yarn-mistral" or ' if any(turn.role == "system" for turn in sample.turns) else ""
    return (
        f"evaluate.chat_template: the model's chat template refuses the turns of {sample.task} ({roles}): {error}; set "
        f"{other}chat_template = false for this task in evaluate.tasks"
    )
