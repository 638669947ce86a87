"""Encode rows as token ids and a mask of the assistant's tokens, with the model's own chat template.

Only what the assistant says is supervised: its words and the token that ends its turn. Templates that mark these
spans themselves (`{% generation %}`) are trusted; for all others a turn's span is the text that the template adds
after the generation prompt when the turn is appended.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from secvec_jax.data.control_tokens import mark, spelled, tokenize
from secvec_jax.data.rows import Message
from secvec_jax.errors import UserError
from secvec_jax.turns import chat_template, render, turn_ends


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
        """The number of tokens before the first that the assistant said."""
        return int(np.argmax(self.supervised))


ControlTokens = Literal["text", "tokens", "refuse"]
"""How control tokens that a row spells, such as "<|im_end|>", are read: as plain text or as tokens, or refused."""


class TooLong(UserError):
    """A prompt that leaves no room for its answer."""


def prompt_tokens(tokenizer: Any, messages: list[Message], max_length: int) -> np.ndarray:
    """The ids of a prompt, `[N]`: the conversation up to the assistant's turn.

    Raises UserError if they exceed `max_length`, and for turns that the template does not take.
    """
    turns, marks = mark(tokenizer, messages)
    text = render(tokenizer, turns, add_generation_prompt=True)
    tokens, _ = _read(lambda: tokenize(tokenizer, text, marks, starts=False))
    if len(tokens) > max_length:
        raise TooLong(_too_long(len(tokens), max_length))
    return np.asarray(tokens, np.int32)


def encode(tokenizer: Any, messages: list[Message], max_length: int, control: ControlTokens = "text") -> Example:
    """Encode a conversation as ids and mask. A reply that runs past `max_length` is cut, its prompt is not.

    Turns of the assistant that are marked `train: False` are not supervised. Raises UserError if the prompt alone fills
    `max_length`, if no turn is the assistant's to learn, if the template does not take the turns or rewrites what
    comes before a turn, so that the turn's span cannot be found, and for control tokens if `control` is "refuse".
    """
    example = encode_all(tokenizer, messages, control)
    if example.answer_start >= max_length:
        raise TooLong(_too_long(example.answer_start, max_length))
    return cut(example, max_length)


def encode_all(tokenizer: Any, messages: list[Message], control: ControlTokens = "text") -> Example:
    """As `encode`, without a maximum length."""
    if control == "refuse" and (spelled_tokens := spelled(tokenizer, messages)):
        raise UserError(
            f"the text spells the control token {spelled_tokens[0]!r}: remove it, or set control_tokens to text"
        )
    turns, marks = mark(tokenizer, messages) if control == "text" else (messages, "")
    if not marks and _GENERATION.search(chat_template(tokenizer) or ""):
        tokens, supervised = _marked_by_template(tokenizer, turns)
    else:
        tokens, supervised = _marked_by_difference(tokenizer, turns, marks)
    if not supervised.any():
        raise UserError(f"a row has no assistant turn ({_clip(messages)}): every row needs an answer to learn")
    return Example(tokens, supervised)


def cut(example: Example, length: int) -> Example:
    """The first `length` tokens of an example."""
    return Example(example.tokens[:length], example.supervised[:length])


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _marked_by_template(tokenizer: Any, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
    render(tokenizer, messages)  # raises the template's own error for turns that it rejects
    options = {"chat_template": chat_template(tokenizer), "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = _read(lambda: tokenizer.apply_chat_template(messages, **options))
    supervised = np.asarray(encoded["assistant_masks"], bool)
    learned = [message.get("train", True) for message in messages if message["role"] == "assistant"]
    if not all(learned):
        edges = np.flatnonzero(np.diff(np.pad(supervised.astype(int), 1)))
        if len(edges) != 2 * len(learned):
            raise UserError(
                f"the chat template marks {len(edges) // 2} spans in {len(learned)} turns of the assistant, so those "
                "that are not to be learned cannot be found: split the row"
            )
        for first, last, keep in zip(edges[::2], edges[1::2], learned, strict=True):
            supervised[first:last] &= keep
    return np.asarray(encoded["input_ids"], np.int32), supervised


def _marked_by_difference(tokenizer: Any, messages: Sequence[Message], marks: str) -> tuple[np.ndarray, np.ndarray]:
    text = render(tokenizer, messages)
    ids, starts = _read(lambda: tokenize(tokenizer, text, marks))
    tokens, begins = np.asarray(ids, np.int32), np.asarray(starts)
    supervised = np.zeros(len(tokens), bool)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or not message.get("train", True):
            continue
        before = _text_before(tokenizer, messages, turn)
        after = render(tokenizer, messages[: turn + 1])
        if not (after.startswith(before) and text.startswith(after)):
            raise UserError(
                "the chat template rewrites earlier turns, so the assistant's spans cannot be found: use a template "
                'with {% generation %} blocks, rows of one question and one answer, or "train": false on all but the '
                "last turn of the assistant"
            )
        span = (begins >= len(before)) & (begins < len(after))
        supervised |= span & _until_end_of_turn(tokens, span, turn_ends(tokenizer)[:1])
    return tokens, supervised


_PLACEHOLDER = "\ue000"


def _text_before(tokenizer: Any, messages: Sequence[Message], turn: int) -> str:
    """The text before the words of an assistant's turn."""
    if turn:
        return render(tokenizer, messages[:turn], add_generation_prompt=True)
    # An empty conversation cannot be rendered, and a default system prompt comes with the first turn alone.
    return render(tokenizer, [{**messages[0], "content": _PLACEHOLDER}]).partition(_PLACEHOLDER)[0]


def _until_end_of_turn(tokens: np.ndarray, span: np.ndarray, end: tuple[int, ...]) -> np.ndarray:
    """All tokens up to the span's last end-of-turn token: what a template adds after it is not the assistant's."""
    ends = np.flatnonzero(span & np.isin(tokens, end))
    last = ends[-1] if len(ends) else len(tokens)
    return np.arange(len(tokens)) <= last


def _read(read: Callable[[], Any]) -> Any:
    """The result of a tokenizer's call, whose errors are raised as UserError."""
    try:
        return read()
    except Exception as error:  # tokenizers raises errors worded for Rust
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnicodeEncodeError | TypeError):
            reason = "it has half of a character, such as a part of an emoji"
        raise UserError(f"the tokenizer cannot read the text: {reason[:300]}") from error


def _too_long(length: int, max_length: int) -> str:
    return f"a prompt has {length} tokens, but the maximum length is {max_length}: shorten it, or raise the maximum"


def _clip(messages: list[Message]) -> str:
    return repr(messages[0]["content"][:40]) if messages else "empty"
