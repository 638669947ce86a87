"""Encode rows as token ids and a mask of the assistant's tokens, with the model's own chat template.

Only what the assistant says is supervised: its words and the token that ends its turn. Templates that mark these
spans themselves (`{% generation %}`) are trusted; for all others a turn's span is the text that the template adds
after the generation prompt when the turn is appended. A token that is in a span in part is supervised.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from secvec_jax.data.control_tokens import mark, spelled, tokenize
from secvec_jax.data.rows import Message
from secvec_jax.errors import UserError
from secvec_jax.turns import chat_template, check_rendered, read_by_tokenizer, render, turn_ends


@dataclasses.dataclass(frozen=True)
class Example:
    """One row as token ids `[N]`, and for each token whether the assistant said it, `[N]`.

    weights: of the losses of supervised tokens, `[N]`; None: 1.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    weights: np.ndarray | None = None

    @property
    def answer_start(self) -> int:
        """The number of tokens before the first that the assistant said."""
        return int(np.argmax(self.supervised))


MAX_TURNS = 10_000
"""Limit for the turns of a row."""
_RENDERED_TURNS = 2**16
"""Limit for the turns that are rendered to find the assistant's spans from all beginnings of a row. Their number grows
with the square of the row's turns; a row of about 360 turns stays within it."""
_WINDOW = 16
"""Minimum number of turns of a longer row that are rendered together."""
_MAX_WINDOW = 512
"""Maximum number of turns between the starts of two windows."""

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
    check_rendered(text, turns)
    tokens, _ = read_by_tokenizer(lambda: tokenize(tokenizer, text, marks, places=False))
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
    if len(messages) > MAX_TURNS:
        raise UserError(f"a row has {len(messages):,} turns, more than the limit of {MAX_TURNS:,}: split it")
    if control == "refuse" and (spelled_tokens := spelled(tokenizer, messages)):
        raise UserError(
            f"the text spells the control token {spelled_tokens[0]!r}: remove it, or set control_tokens to text"
        )
    turns, marks = mark(tokenizer, messages) if control == "text" else (messages, "")
    text = render(tokenizer, turns)
    check_rendered(text, turns)
    tokens, begins, ends = _tokenized(tokenizer, text, marks)
    is_end = np.zeros(len(tokens), bool)
    if _GENERATION.search(chat_template(tokenizer) or ""):
        spans: Iterable[tuple[int, int]] = _spans_of_template(tokenizer, turns)
    else:
        rendered = len(turns) * sum(map(_is_learned, turns))
        find = _spans if rendered <= _RENDERED_TURNS else _spans_by_window
        spans = find(tokenizer, turns, text)
        is_end = np.isin(tokens, turn_ends(tokenizer)[:1])
    supervised = np.zeros(len(tokens), bool)
    for first, last in spans:
        # Also a token that is in the span in part: it may begin with the space before the answer.
        span = np.flatnonzero(((begins >= first) | (ends > first)) & (begins < last))
        end = span[is_end[span]][-1:]
        # What a template adds after the end of the turn is not the assistant's.
        supervised[span[span <= end] if len(end) else span] = True
    if not supervised.any():
        raise UserError(f"a row has no assistant turn ({_clip(messages)}): every row needs an answer to learn")
    return Example(tokens, supervised)


def cut(example: Example, length: int) -> Example:
    """The first `length` tokens of an example."""
    return Example(example.tokens[:length], example.supervised[:length])


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _tokenized(tokenizer: Any, text: str, marks: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids of a rendered chat, and where each token begins and ends in it, `[N]` each."""
    ids, places = read_by_tokenizer(lambda: tokenize(tokenizer, text, marks))
    begins, ends = np.asarray(places, np.int64).reshape(-1, 2).T
    return read_by_tokenizer(lambda: np.asarray(ids, np.int32)), begins, ends


def _spans_of_template(tokenizer: Any, messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Where the spans that the template marks begin and end in the text, without those of turns not to be learned."""
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation: list[dict[str, Any]] = [dict(message) for message in messages]
    rendered: Any = render_jinja_template(
        [conversation],
        chat_template=chat_template(tokenizer),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    _, (spans,) = rendered
    learned = [_is_learned(message) for message in messages if message["role"] == "assistant"]
    if all(learned):
        return list(spans)
    if len(spans) != len(learned):
        raise UserError(
            f"the chat template marks {len(spans)} spans for {len(learned)} assistant turns, so those that should "
            "not be learned cannot be found: split the row"
        )
    return [span for span, keep in zip(spans, learned) if keep]


def _is_learned(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("train", True)


def _spans(tokenizer: Any, messages: Sequence[Message], text: str, known: int = 0) -> Iterator[tuple[int, int]]:
    """Yield where each of the assistant's turns to be learned begins and ends in the text of all turns.

    known: the turns to leave out at the beginning. Raises UserError if the template rewrites earlier turns.
    """
    for turn in range(known, len(messages)):
        if _is_learned(messages[turn]):
            before = _text_before(tokenizer, messages, turn)
            after = text if turn + 1 == len(messages) else render(tokenizer, messages[: turn + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise UserError(
                    "the chat template rewrites earlier turns, so the assistant's spans cannot be found: use a "
                    'template with {% generation %} blocks, rows of one question and one answer, or "train": false on '
                    "all but the last assistant turn"
                )
            yield len(before), len(after)


def _spans_by_window(tokenizer: Any, messages: Sequence[Message], text: str) -> Iterator[tuple[int, int]]:
    """As `_spans`, in linear time: the beginning of the row is rendered with one window of later turns at a time.

    This assumes that the text of a turn depends only on the first exchange and the turns shortly before it, and checks
    it: the texts of all windows must add up to that of the whole conversation.
    """
    starts = _window_starts(messages)
    head = messages[: starts[0]]
    head_text = render(tokenizer, head)
    yield from _spans(tokenizer, head, head_text)
    at = len(head_text)
    for start, end in zip(starts, [*starts[1:], len(messages)]):
        window = [*head, *messages[start:end]]
        window_text = render(tokenizer, window)
        added = window_text.removeprefix(head_text)
        if not (window_text.startswith(head_text) and text.startswith(added, at)):
            raise UserError(
                f"a row has {len(messages):,} turns, too many to find the assistant's, since the chat template does "
                "not render each turn independently: split the row"
            )
        shift = at - len(head_text)
        yield from ((shift + first, shift + last) for first, last in _spans(tokenizer, window, window_text, len(head)))
        at += len(added)
    if at != len(text) or not text.startswith(head_text):
        raise UserError("the chat template renders a row of many turns differently from its parts: split the row")


def _window_starts(messages: Sequence[Message]) -> list[int]:
    """The user's turns, each after an answer, at which a long row is divided. Raises UserError if they are too few."""
    starts: list[int] = []
    for turn in range(1, len(messages)):
        is_exchange = messages[turn]["role"] == "user" and messages[turn - 1]["role"] == "assistant"
        if is_exchange and (not starts or turn - starts[-1] >= _WINDOW):
            starts.append(turn)
    if not starts or max(b - a for a, b in zip([0, *starts], [*starts, len(messages)])) > _MAX_WINDOW:
        raise UserError(
            f"a row has {len(messages):,} turns, and more than {_MAX_WINDOW} without a question after an answer: "
            "split it"
        )
    return starts


_PLACEHOLDER = "\ue000"


def _text_before(tokenizer: Any, messages: Sequence[Message], turn: int) -> str:
    """The text before the words of an assistant's turn."""
    if turn:
        return render(tokenizer, messages[:turn], add_generation_prompt=True)
    # An empty conversation cannot be rendered, and a default system prompt comes only with the first turn.
    return render(tokenizer, [{**messages[0], "content": _PLACEHOLDER}]).partition(_PLACEHOLDER)[0]


def _too_long(length: int, max_length: int) -> str:
    return f"a prompt has {length} tokens, but the maximum length is {max_length}: shorten it, or raise the maximum"


def _clip(messages: list[Message]) -> str:
    return repr(messages[0]["content"][:40]) if messages else "empty"
