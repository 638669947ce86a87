"""Rows as examples for a model, each of them checked before anything is trained.

Encoding a row shows what its file does not: a prompt that leaves no room for an answer, an answer that is cut, text
that spells the model's control tokens, turns that its template does not take. All rows are encoded once to find out;
of several processes each takes a part.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from secvec_jax.batch import check_token_ids
from secvec_jax.data.chat import ControlTokens, Example, TooLong, cut, encode_all
from secvec_jax.data.control_tokens import spelled
from secvec_jax.data.rows import Row
from secvec_jax.data.stored import place_of
from secvec_jax.distributed import all_gather_json, is_main_process
from secvec_jax.errors import UserError

LongRows = Literal["truncate", "drop", "refuse"]
"""What becomes of rows that are longer than they may be: the answer is cut, the row is left out, or an error."""

LENGTHS = (256, 512, 1024, 2048)
"""Of packed lines, in tokens, where no length is set: the shortest that holds the longest row, or the longest."""

_KEPT = 50_000
"""Examples of one source that memory holds; beyond, the least recently used ones are encoded anew."""

_NAMED = 3
"""Rows that a message names."""

_log = logging.getLogger(__name__)


class Encoded(Sequence[Example]):
    """Rows as examples, each encoded when it is first asked for: a host asks for those of its own lanes.

    longest: tokens of the longest. truncated: how many have an answer that is cut.
    """

    def __init__(
        self, encode: Callable[[int], Example], rows: Sequence[Row], kept: Sequence[int], longest: int, truncated: int
    ):
        """kept: which rows are examples, by their index."""
        self._encode, self._rows, self._kept = encode, rows, kept
        self.longest, self.truncated = longest, truncated

    def __len__(self) -> int:
        return len(self._kept)

    def row(self, index: int) -> Row:
        """What an example was before."""
        return self._rows[self._kept[index]]

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # nobody slices
        return self._encode(self._kept[range(len(self))[index]])


def encoded(
    tokenizer: Any,
    rows: Sequence[Row],
    max_length: int,
    name: str = "data",
    long_rows: LongRows = "truncate",
    control_tokens: ControlTokens = "text",
    vocab_size: int | None = None,
) -> Encoded:
    """The rows as examples of at most `max_length` tokens, with ids below `vocab_size` if that is given.

    Logs how many answers are cut or rows left out, and how many rows spell control tokens, with the first of them;
    `name` is what rows are called that do not know where they are stored. Raises UserError, naming the row, for one
    that cannot be encoded or has a token that the model has no embedding for, for a prompt that leaves no room for an
    answer, and with "refuse" for an answer that would be cut.
    """

    @functools.lru_cache(_KEPT)
    def encode(index: int) -> tuple[Example, bool]:
        """The example, and whether some of its answer is cut."""
        whole = encode_all(tokenizer, rows[index]["messages"], control_tokens)
        if vocab_size is not None:
            check_token_ids(whole.tokens, vocab_size, "the row")
        if whole.answer_start >= max_length:
            raise TooLong(f"a prompt has {whole.answer_start} tokens")
        return cut(whole, max_length), bool(whole.supervised[max_length:].any())

    def where(index: int) -> str:
        return place_of(rows, index, name)

    found = _look_at_all(encode, lambda index: bool(spelled(tokenizer, rows[index]["messages"])), len(rows))
    if found.errors:
        index, message = min(found.errors)
        raise UserError(f"{where(index)}: {message}")
    too_long = sorted(found.prompts)
    shortened = sorted(found.cut)
    if too_long and long_rows != "drop":
        index, message = too_long[0]
        raise UserError(
            f"{where(index)}{_more(len(too_long) - 1)}: {message}, but the maximum length is {max_length}: shorten it, "
            "raise `length` if the model allows it, or set long_rows to drop"
        )
    if shortened and long_rows == "refuse":
        raise UserError(
            f"{where(shortened[0])}{_more(len(shortened) - 1)}: the answer runs past the maximum length of "
            f"{max_length} tokens: raise `length`, or set long_rows to truncate or drop"
        )
    kept: Sequence[int] = range(len(rows))
    if long_rows == "drop" and (too_long or shortened):
        left_out = sorted([*shortened, *(index for index, _ in too_long)])
        kept = sorted(set(range(len(rows))) - set(left_out))
        _warn(left_out, len(rows), f"are longer than {max_length} tokens and dropped", where)
        if not kept:
            raise UserError(f"every row of {name} is longer than {max_length} tokens: raise `length`")
        shortened, found.longest = [], found.longest_uncut
    elif shortened:
        _warn(shortened, len(rows), f"have answers cut at {max_length} tokens: raise `length`, or set long_rows", where)
    if found.spelled:
        what = "plain text" if control_tokens == "text" else "the tokens"
        _warn(sorted(found.spelled), len(rows), f"spell control tokens, which are learned as {what}", where)
    return Encoded(lambda index: encode(index)[0], rows, kept, found.longest, len(shortened))


@dataclasses.dataclass
class _Found:
    """What a look at some rows has found, by their index."""

    longest: int = 0
    """tokens, as far as they are not cut"""
    longest_uncut: int = 0
    """tokens of the longest that is not cut at all"""
    cut: list[int] = dataclasses.field(default_factory=list)
    spelled: list[int] = dataclasses.field(default_factory=list)
    prompts: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    """those whose prompt alone is too long, and how long it is"""
    errors: list[tuple[int, str]] = dataclasses.field(default_factory=list)


def _look_at_all(encode: Callable[[int], tuple[Example, bool]], spells: Callable[[int], bool], count: int) -> _Found:
    """What all processes have found; they divide the rows among them."""
    mine = _Found()
    for index in range(jax.process_index(), count, jax.process_count()):
        try:
            example, shortened = encode(index)
        except TooLong as error:
            mine.prompts.append((index, str(error)))
            continue
        except UserError as error:
            mine.errors.append((index, str(error)))
            break
        mine.longest = max(mine.longest, len(example.tokens))
        if shortened:
            mine.cut.append(index)
        else:
            mine.longest_uncut = max(mine.longest_uncut, len(example.tokens))
        if spells(index):
            mine.spelled.append(index)
    parts = [_Found(**part) for part in all_gather_json(dataclasses.asdict(mine))]
    return _Found(
        max(part.longest for part in parts),
        max(part.longest_uncut for part in parts),
        [index for part in parts for index in part.cut],
        [index for part in parts for index in part.spelled],
        [(index, message) for part in parts for index, message in part.prompts],
        [(index, message) for part in parts for index, message in part.errors],
    )


def _warn(indices: Sequence[int], count: int, what: str, where: Callable[[int], str]) -> None:
    if is_main_process():
        first = "; ".join(where(index) for index in indices[:_NAMED])
        more = _more(len(indices) - _NAMED)
        _log.warning("%d of %d rows %s: %s%s", len(indices), count, what, first, more)


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
