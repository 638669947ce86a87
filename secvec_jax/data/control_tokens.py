"""Tokenize text that spells control tokens, by which a chat is divided into turns, as plain text.

An answer with "<|im_end|>" in it says these ten characters and does not end its turn. Tokenizers cannot distinguish
them from what the template wrote, so they are wrapped in two marks before the template sees them, and what is between
the marks is tokenized as plain text. Rows that spell none are tokenized at once.
"""

import contextlib
import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

from secvec_jax.data.rows import Message
from secvec_jax.errors import UserError
from secvec_jax.turns import chat_template, read_by_tokenizer, render, state_of, turn_ends

_Place = tuple[int, int]
"""Where a token begins and ends in a text, in characters."""


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The tokens that divide a chat: the special ones, and those that the template puts around a user's turn.

    Added tokens such as "<think>", which an assistant may say, are not among them.
    """
    return _control_tokens(tokenizer, chat_template(tokenizer), state_of(tokenizer))


@functools.lru_cache(maxsize=8)
def _control_tokens(tokenizer: Any, template: str | None, state: tuple[Any, ...]) -> tuple[str, ...]:
    added = tokenizer.added_tokens_decoder
    tokens = {str(token) for token in added.values() if token.special}
    with contextlib.suppress(UserError):  # without a template, or where this one does not take a user's turn alone
        question: list[Message] = [{"role": "user", "content": "asked"}]
        turn = render(tokenizer, question)
        opening = render(tokenizer, question, add_generation_prompt=True).removeprefix(turn)
        ids = read_by_tokenizer(lambda: tokenizer.encode(turn, add_special_tokens=False))
        ids += read_by_tokenizer(lambda: tokenizer.encode(opening, add_special_tokens=False))[:1]
        tokens |= {str(added[token]) for token in (*ids, *turn_ends(tokenizer)) if token in added}
    return tuple(sorted((token for token in tokens if token.strip()), key=len, reverse=True))


def spelled(tokenizer: Any, messages: Sequence[Message]) -> list[str]:
    """The control tokens that the turns spell, the longest first."""
    texts = [turn["content"] for turn in messages]
    tokens = [
        token
        for first, tokens in _by_first_character(control_tokens(tokenizer)).items()
        if any(first in text for text in texts)
        for token in tokens
        if any(token in text for text in texts)
    ]
    return sorted(tokens, key=len, reverse=True)


@functools.lru_cache(maxsize=8)
def _by_first_character(tokens: tuple[str, ...]) -> dict[str, list[str]]:
    """Gemma has thousands of control tokens, all of which begin with "<": most texts spell none."""
    groups: dict[str, list[str]] = {}
    for token in tokens:
        groups.setdefault(token[0], []).append(token)
    return groups


def mark(tokenizer: Any, messages: Sequence[Message]) -> tuple[Sequence[Message], str]:
    """Put each control token that the turns spell between two marks; return the turns and the marks ("" if none)."""
    spelled_tokens = spelled(tokenizer, messages)
    if not spelled_tokens:
        return messages, ""
    text = "".join(turn["content"] for turn in messages)
    first, last = itertools.islice((mark for mark in map(chr, _PRIVATE) if mark not in text), 2)
    pattern = re.compile("|".join(map(re.escape, spelled_tokens)))
    marked: list[Message] = [
        {**turn, "content": pattern.sub(rf"{first}\g<0>{last}", turn["content"])} for turn in messages
    ]
    return marked, first + last


_PRIVATE = range(0xF0000, 0xFFFFE)
"""Characters without a meaning: the marks are two of them that the row does not contain."""


def tokenize(tokenizer: Any, text: str, marks: str, places: bool = True) -> tuple[list[int], list[_Place]]:
    """The ids of a rendered chat and, with `places`, where each begins and ends in it; what is between `marks` is plain
    text."""
    if not marks:
        return _encoded(tokenizer, text, places=places)
    ids: list[int] = []
    found: list[_Place] = []
    begin = 0
    for piece in re.split(f"({marks[0]}[^{marks}]*{marks[1]}|[{marks}])", text):  # a template may separate two marks
        inner = piece.strip(marks)
        if inner:
            piece_ids, within = _plain(tokenizer, inner) if inner != piece else _inside(tokenizer, inner)
            ids += piece_ids
            found += _shifted(within, begin + piece.index(inner))
        begin += len(piece)
    return ids, found


def _plain(tokenizer: Any, token: str) -> tuple[list[int], list[_Place]]:
    """A control token's characters, as ids of plain text."""
    ids, places = _inside(tokenizer, token, split_special_tokens=True)
    if tokenizer.convert_tokens_to_ids(token) not in ids:
        return ids, places
    # Added tokens that are not special are recognized in any text, but not if it is tokenized in two pieces.
    (first, _), (rest, after) = _inside(tokenizer, token[:1]), _inside(tokenizer, token[1:])
    return first + rest, [(0, 1)] * len(first) + _shifted(after, 1)


def _inside(tokenizer: Any, text: str, **more: bool) -> tuple[list[int], list[_Place]]:
    """A piece from within a text: after a line break, or SentencePiece would put a space in front of it."""
    line_break, _ = _encoded(tokenizer, "\n")
    ids, places = _encoded(tokenizer, "\n" + text, **more)
    if ids[: len(line_break)] != line_break:  # the line break joins what follows it
        return _encoded(tokenizer, text, **more)
    return ids[len(line_break) :], _shifted(places[len(line_break) :], -1)


def _shifted(places: Sequence[_Place], by: int) -> list[_Place]:
    return [(start + by, end + by) for start, end in places]


def _encoded(tokenizer: Any, text: str, places: bool = True, **more: bool) -> tuple[list[int], list[_Place]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=places, **more)
    return encoded["input_ids"], list(encoded["offset_mapping"]) if places else []
