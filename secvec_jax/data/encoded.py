"""Encode rows as examples for a model, and check all of them before anything is trained.

Some problems appear only when a row is encoded: a prompt that leaves no room for an answer, an answer that is cut, text
that spells the model's control tokens, turns that its template rejects. So all rows are encoded once, and their lengths
are kept, so that packed sequences can be counted. With several processes, each encodes a part.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from secvec_jax.batch import check_token_ids
from secvec_jax.data.chat import ControlTokens, Example, TooLong, cut, encode_all
from secvec_jax.data.control_tokens import spelled
from secvec_jax.data.rows import Row
from secvec_jax.data.shared_prefix import PromptIndex, agreement
from secvec_jax.data.stored import location_of
from secvec_jax.distributed import all_gather_json, is_main_process
from secvec_jax.errors import UserError
from secvec_jax.printable import hidden
from secvec_jax.turns import turn_ends

LongRows = Literal["truncate", "drop", "refuse"]
"""How rows that are too long are handled: the answer is cut, the row is left out, or it is an error."""

LENGTHS = (256, 512, 1024, 2048)
"""Default lengths of packed sequences: the shortest one that fits the longest row is used, or the longest."""

_CACHE_SIZE = 50_000
"""Examples of one source that are kept in memory; the least recently used ones are dropped and encoded again."""

_MAX_NAMED = 3
"""Maximum number of rows that a message names."""

_log = logging.getLogger(__name__)


class Examples(Sequence[Example]):
    """Rows as examples, each encoded when it is accessed: a process accesses only those of its substreams.

    lengths: tokens of each `[N]`, int32. prompts: the index of their prompts. truncated: how many answers are cut.
    These come from encoding all rows once; reading them encodes no row again.
    """

    def __init__(
        self,
        encode: Callable[[int], Example],
        rows: Sequence[Row],
        indices: Sequence[int],
        lengths: np.ndarray,
        prompts: PromptIndex,
        truncated: int,
    ):
        """indices: which rows are examples, by their index."""
        self._encode, self._rows, self._indices = encode, rows, indices
        self.lengths, self.prompts, self.truncated = lengths, prompts, truncated

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return int(self.lengths.max(initial=0))

    def __len__(self) -> int:
        return len(self._indices)

    def row(self, index: int) -> Row:
        """The row that an example was made of."""
        return self._rows[self._indices[index]]

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # nobody slices
        return self._encode(self._indices[range(len(self))[index]])


def encode_rows(
    tokenizer: Any,
    rows: Sequence[Row],
    max_length: int,
    name: str = "data",
    long_rows: LongRows = "truncate",
    control_tokens: ControlTokens = "text",
    vocab_size: int | None = None,
) -> Examples:
    """Encode rows as examples of at most `max_length` tokens; the model has an embedding for ids below `vocab_size`.

    Logs how many answers are cut or rows left out, how many complete answers have no token that ends them, how many
    rows spell control tokens, and how many contain control or invisible characters (terminal escapes, reversed
    directions of writing), with the first of them; `name` is for errors about rows that do not record where they are
    stored. Raises UserError, naming the row, for one that cannot be encoded or has a token that the model has no
    embedding for, for a prompt that leaves no room for an answer, and with "refuse" for an answer that would be cut.
    """

    @functools.lru_cache(_CACHE_SIZE)
    def encode(index: int) -> tuple[Example, bool]:
        """The example, and whether part of its answer is cut."""
        example = encode_all(tokenizer, rows[index]["messages"], control_tokens)
        if vocab_size is not None:
            check_token_ids(example.tokens, vocab_size, "the row")
        if example.answer_start >= max_length:
            raise TooLong(f"a prompt has {example.answer_start} tokens")
        return cut(example, max_length), bool(example.supervised[max_length:].any())

    def where(index: int) -> str:
        return location_of(rows, index, name)

    def spells(index: int) -> bool:
        return bool(spelled(tokenizer, rows[index]["messages"]))

    def hides(index: int) -> bool:
        return any(hidden(turn["content"]) for turn in rows[index]["messages"])

    ends = functools.cache(lambda: turn_ends(tokenizer))

    def stops(example: Example) -> bool:
        return bool(np.isin(example.tokens[example.supervised], ends()).any())

    results = _encode_once(encode, spells, hides, stops, len(rows))
    if results.errors:
        index, message = min(results.errors)
        raise UserError(f"{where(index)}: {message}")
    too_long = sorted(results.too_long)
    shortened = sorted(results.cut)
    if too_long and long_rows != "drop":
        index, message = too_long[0]
        raise UserError(
            f"{where(index)}{_more(len(too_long) - 1)}: {message}, but the maximum length is {max_length}: shorten it, "
            "raise `max_seq_len` if the model allows it, or, for a training, set `long_rows` to drop"
        )
    if shortened and long_rows == "refuse":
        raise UserError(
            f"{where(shortened[0])}{_more(len(shortened) - 1)}: the answer runs past the maximum length of "
            f"{max_length} tokens: raise `max_seq_len`, or set `long_rows` to truncate or drop"
        )
    kept: Sequence[int] = range(len(rows))
    if long_rows == "drop" and (too_long or shortened):
        left_out = sorted([*shortened, *(index for index, _ in too_long)])
        kept = sorted(set(range(len(rows))) - set(left_out))
        _warn(left_out, len(rows), f"are longer than {max_length} tokens and dropped", where)
        if not kept:
            raise UserError(f"every row of {name} is longer than {max_length} tokens: raise `max_seq_len`")
        shortened = []
    elif shortened:
        description = f"have answers cut at {max_length} tokens: raise `max_seq_len`, or set `long_rows`"
        _warn(shortened, len(rows), description, where)
    if results.endless:
        description = (
            "have no token that ends the answer among what is learned, so the model may not learn to stop; use a chat "
            "template that ends the assistant's turns with one"
        )
        _warn(sorted(results.endless), len(rows), description, where)
    if results.spelled:
        form = "plain text" if control_tokens == "text" else "the tokens"
        _warn(sorted(results.spelled), len(rows), f"spell control tokens, which are learned as {form}", where)
    if results.hidden:
        index = min(results.hidden)
        first = next(filter(None, (hidden(turn["content"]) for turn in rows[index]["messages"])))
        description = f"contain control or invisible characters ({first} in the first), which are learned as they are"
        _warn(sorted(results.hidden), len(rows), description, where)
    lengths, prompt_lengths, agreeing, following = results.numbers[:, list(kept)]
    prompts = PromptIndex(results.first, prompt_lengths, agreeing, following)
    return Examples(lambda index: encode(index)[0], rows, kept, lengths, prompts, len(shortened))


@dataclasses.dataclass
class _EncodingResults:
    """The results of encoding all rows once; rows are named by their index."""

    first: np.ndarray
    """the prompt that the others are compared with"""
    numbers: np.ndarray
    """of each row: its tokens, its prompt's tokens, and its `agreement` with `first`; `[4, N]`, int32"""
    cut: list[int] = dataclasses.field(default_factory=list)
    endless: list[int] = dataclasses.field(default_factory=list)
    """those that are complete and have no supervised token that ends a turn"""
    spelled: list[int] = dataclasses.field(default_factory=list)
    hidden: list[int] = dataclasses.field(default_factory=list)
    """those with control or invisible characters"""
    too_long: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    """those whose prompt alone is too long, and how long it is"""
    errors: list[tuple[int, str]] = dataclasses.field(default_factory=list)


def _encode_once(
    encode: Callable[[int], tuple[Example, bool]],
    spells: Callable[[int], bool],
    hides: Callable[[int], bool],
    stops: Callable[[Example], bool],
    count: int,
) -> _EncodingResults:
    """Encode all rows, of which each process takes a part, and gather the results of all."""
    start, stride = jax.process_index(), jax.process_count()
    results = _EncodingResults(_first_prompt(encode, count), np.zeros((4, count), np.int32))
    for index in range(start, count, stride):
        try:
            example, shortened = encode(index)
        except TooLong as error:
            results.too_long.append((index, str(error)))
            continue
        except UserError as error:
            results.errors.append((index, str(error)))
            break
        prompt = example.tokens[: example.answer_start]
        results.numbers[:, index] = len(example.tokens), len(prompt), *agreement(results.first, prompt)
        if shortened:
            results.cut.append(index)
        elif not stops(example):
            results.endless.append(index)
        if spells(index):
            results.spelled.append(index)
        if hides(index):
            results.hidden.append(index)
    return results if stride == 1 else _gather_results(results)


def _first_prompt(encode: Callable[[int], tuple[Example, bool]], count: int) -> np.ndarray:
    """The prompt of the first row that can be encoded, the same on all processes."""
    for index in range(count):
        with contextlib.suppress(UserError):
            example, _ = encode(index)
            return example.tokens[: example.answer_start]
    return np.zeros(0, np.int32)


def _gather_results(results: _EncodingResults) -> _EncodingResults:
    """The results of all processes; each row was encoded by one of them."""
    lists = {name: value for name, value in vars(results).items() if isinstance(value, list)}
    numbers = results.numbers[:, jax.process_index() :: jax.process_count()]
    parts = all_gather_json({"numbers": numbers.tolist(), "lists": lists})
    merged = _EncodingResults(results.first, np.zeros_like(results.numbers))
    for process, part in enumerate(parts):
        merged.numbers[:, process :: len(parts)] = part["numbers"]
        for name, values in part["lists"].items():
            getattr(merged, name).extend(tuple(value) if isinstance(value, list) else value for value in values)
    return merged


def _warn(indices: Sequence[int], count: int, description: str, where: Callable[[int], str]) -> None:
    if is_main_process():
        first = "; ".join(where(index) for index in indices[:_MAX_NAMED])
        more = _more(len(indices) - _MAX_NAMED)
        _log.warning("%d of %d rows %s: %s%s", len(indices), count, description, first, more)


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
