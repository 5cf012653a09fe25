"""Conversations in, token ids and per-token loss weights out. Pure: the tokenizer's own chat template does the rest.

Only what the assistant says is a target: its content and the token that ends its turn, in every turn. The spans are
found in the rendered text, by rendering the conversation up to each assistant turn, and carried to tokens by the
tokenizer's character offsets, so the ids are those of the whole conversation tokenised once, as at inference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ultralong_ray.types import TokenizedDocument, UserError

Message = Mapping[str, str]


def parse_messages(value: Any) -> list[dict[str, str]]:
    """Messages of a row: a list of {role, content}, or the JSON text of one.

    Raises ValueError saying what is wrong, for instance that no turn is the assistant's.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
            raise ValueError(f"messages is not valid JSON ({error})") from None
    if not isinstance(value, list) or not value:
        raise ValueError("messages is empty or no list of {role, content}")
    messages = [_parse_message(i, message) for i, message in enumerate(value)]
    if messages[0]["role"] == "assistant":
        raise ValueError("messages opens with the assistant's turn; start with a user or system turn")
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("messages has no turn of role assistant, so nothing to learn from")
    return messages


def _parse_message(index: int, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"messages[{index}] is {type(message).__name__}, not {{role, content}}")
    return {key: _parse_text(f"messages[{index}].{key}", message.get(key)) for key in ("role", "content")}


def _parse_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell and no tokenizer takes
        raise ValueError(f"{name} is not valid Unicode ({error.reason})") from None
    return value


def check_template(tokenizer: Any) -> None:
    """Raises UserError when the tokenizer cannot render or align conversations."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "sft: the tokenizer has no chat template; add chat_template.jinja to the folder of model.base, or start "
            "from an instruction-tuned model"
        )
    if not tokenizer.is_fast:
        raise UserError("sft: the tokenizer gives no character offsets (it is no `tokenizers` one); add tokenizer.json")


def assistant_spans(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the character spans [start, end) of the assistant's turns, end of turn included.

    White space that a template writes after the end-of-turn token is no part of a span. Raises UserError when the
    template renders the start of a conversation differently from the same start within the whole, ValueError when it
    refuses these messages.
    """
    whole = _render(tokenizer, messages, prompt=False)
    spans: list[tuple[int, int]] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:i], prompt=True)
        after = _render(tokenizer, messages[: i + 1], prompt=False)
        if not whole.startswith(after) or not after.startswith(before):
            raise UserError(
                f"sft: the tokenizer's chat template ({tokenizer.name_or_path}) renders the start of a conversation "
                f"differently from the same start within the whole (turn {i}), so the assistant's tokens cannot be "
                f"found. Use a template that only appends, or split such samples at that turn"
            )
        start = len(before) + _header_characters(tokenizer, messages[:i], message, before)
        spans.append((start, _end_of_turn(tokenizer, after, start)))
    return whole, spans


def _header_characters(tokenizer: Any, earlier: Sequence[Message], message: Message, before: str) -> int:
    """Length of the role header that a turn opens with although `before`, the prompt for the turn, lacks it.

    0 for a template that writes a generation prompt, which is the header, and for one that has no headers: white space
    alone is none, and stays with the word that it is tokenised with.
    """
    if _render(tokenizer, earlier, prompt=False) != before:
        return 0
    # a mark in place of the content: an answer such as "a" may stand in the header itself
    marked = _render(tokenizer, [*earlier, {**message, "content": "\0"}], prompt=False)
    header, mark, _ = marked[len(before) :].partition("\0")
    return len(header.rstrip(" ")) if mark and header.strip() else 0


def _render(tokenizer: Any, messages: Sequence[Message], *, prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, TypeError) as error:  # TypeError: an expression in it, such as text + number
        raise ValueError(f"messages refused by the chat template ({error})") from None


def _end_of_turn(tokenizer: Any, rendered: str, start: int) -> int:
    """The end of a turn, without white space behind its closing special token."""
    stripped = rendered.rstrip()
    closing = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
    return len(stripped) if len(stripped) > start and stripped.endswith(closing) else len(rendered)


def tokenize_chat(tokenizer: Any, sample_id: str, domain: str, messages: Sequence[Message]) -> TokenizedDocument:
    """Ids [num_tokens] and loss weights [num_tokens] of a conversation: 1 for the assistant's tokens, 0 elsewhere.

    The first token of a sample has weight 0: nothing before it could predict it. Raises UserError for a template that
    `assistant_spans` refuses, and ValueError when no token is a target.
    """
    text, spans = assistant_spans(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], np.int64)
    weight = np.zeros(len(starts), np.uint8)
    for start, end in spans:
        weight[(starts >= start) & (starts < end)] = 1
    weight[:1] = 0
    if not weight.any():
        raise ValueError("messages: the assistant's turns have no tokens")
    return TokenizedDocument(sample_id, domain, np.asarray(encoded["input_ids"], np.int32), weight)
