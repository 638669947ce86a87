"""Rows -> token ids and a mask of the assistant's own tokens, through the model's own chat template.

Only what the assistant says is supervised: its words and the token that ends its turn. Templates that mark these
spans themselves (`{% generation %}`) are believed; for all others a turn's span is the text that the template adds
behind the generation prompt when the turn is appended.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from secvec_jax.data.rows import Message, Row
from secvec_jax.errors import UserError
from secvec_jax.turns import turn_ends


@dataclasses.dataclass(frozen=True)
class Example:
    """One row as token ids `[N]` and, token for token, whether the assistant said it `[N]`.

    weights: how much each token's loss counts where it is supervised, `[N]`; None: 1.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    weights: np.ndarray | None = None

    @property
    def answer_start(self) -> int:
        """How many tokens stand before the first that the assistant said."""
        return int(np.argmax(self.supervised))


def prompt_tokens(tokenizer: Any, messages: list[Message], max_length: int) -> np.ndarray:
    """The ids that a model is given to answer: the conversation up to the assistant's turn, `[N]`.

    Raises UserError if they exceed `max_length`.
    """
    text = _render(tokenizer, messages, add_generation_prompt=True)
    tokens = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    if len(tokens) > max_length:
        raise UserError(_too_long(len(tokens), max_length))
    return tokens


def encode(tokenizer: Any, messages: list[Message], max_length: int) -> Example:
    """A conversation as ids and mask; a reply that runs past `max_length` is cut, its prompt is not.

    Raises UserError if the prompt alone fills `max_length`, if no turn is the assistant's, or if the template
    rewrites what stands before a turn, so that the turn's span cannot be told.
    """
    if "{% generation %}" in (tokenizer.chat_template or "").replace("{%-", "{%").replace("-%}", "%}"):
        tokens, supervised = _marked_by_template(tokenizer, messages)
    else:
        tokens, supervised = _marked_by_difference(tokenizer, messages)
    if not supervised.any():
        raise UserError(f"a row has no assistant turn ({_clip(messages)}): every row needs an answer to learn")
    example = Example(tokens, supervised)
    if example.answer_start >= max_length:
        raise UserError(_too_long(example.answer_start, max_length))
    return Example(tokens[:max_length], supervised[:max_length])


_KEPT = 50_000
"""Examples of one source that memory holds; beyond, the least recently used ones are encoded anew."""


class Encoded(Sequence[Example]):
    """Rows as examples, each encoded when it is first asked for: a host asks for those of its own lanes."""

    def __init__(self, tokenizer: Any, rows: Sequence[Row], max_length: int):
        self._rows = rows
        kept = functools.lru_cache(_KEPT)
        self._encode = kept(lambda index: encode(tokenizer, rows[index]["messages"], max_length))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # nobody slices
        return self._encode(range(len(self))[index])


def _marked_by_template(tokenizer: Any, messages: list[Message]) -> tuple[np.ndarray, np.ndarray]:
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return np.asarray(encoded["input_ids"], np.int32), np.asarray(encoded["assistant_masks"], bool)


def _marked_by_difference(tokenizer: Any, messages: list[Message]) -> tuple[np.ndarray, np.ndarray]:
    text = _render(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = np.asarray(encoded["input_ids"], np.int32)
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]])
    supervised = np.zeros(len(tokens), bool)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:turn], add_generation_prompt=True)
        after = _render(tokenizer, messages[: turn + 1])
        if not (after.startswith(before) and text.startswith(after)):
            raise UserError(
                "the chat template rewrites earlier turns, so the assistant's spans cannot be told: use a template "
                "with {% generation %} blocks, or rows of one question and one answer"
            )
        span = (starts >= len(before)) & (starts < len(after))
        supervised |= span & _until_end_of_turn(tokens, span, turn_ends(tokenizer)[:1])
    return tokens, supervised


def _until_end_of_turn(tokens: np.ndarray, span: np.ndarray, end: tuple[int, ...]) -> np.ndarray:
    """All tokens up to the span's last end-of-turn token: what a template puts behind it is not the assistant's."""
    ends = np.flatnonzero(span & np.isin(tokens, end))
    last = ends[-1] if len(ends) else len(tokens)
    return np.arange(len(tokens)) <= last


def _render(tokenizer: Any, messages: list[Message], add_generation_prompt: bool = False) -> str:
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: use an instruct model, or add a chat_template.jinja")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def _too_long(length: int, max_length: int) -> str:
    return f"a prompt has {length} tokens, but the maximum length is {max_length}: shorten it or raise --length"


def _clip(messages: list[Message]) -> str:
    return repr(messages[0]["content"][:40]) if messages else "empty"
