"""The mapping from the fields of a row to a user's columns with other names.

rows = load_rows("rows.csv:prompt=user_text,response=agent_text")                           # as in --data, --safe, ...
rows = load_rows("rows.csv", columns={"prompt": "user_text", "response": "agent_text"})     # the same
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from secvec_jax.arguments import shown
from secvec_jax.data.fields import ANSWERS, CONTEXTS, CONVERSATIONS, HISTORIES, PROMPTS, SYSTEMS
from secvec_jax.errors import UserError
from secvec_jax.files import expanded
from secvec_jax.remote import exists, is_url
from secvec_jax.suggestions import nearest_name


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns that each field of a row is read from; the first with a value counts.

    mapped: those that the user named. Each must be in at least one row.
    """

    messages: tuple[str, ...] = CONVERSATIONS
    prompt: tuple[str, ...] = PROMPTS
    response: tuple[str, ...] = ANSWERS
    input: tuple[str, ...] = CONTEXTS
    system: tuple[str, ...] = SYSTEMS
    history: tuple[str, ...] = HISTORIES
    mapped: tuple[str, ...] = ()

    @classmethod
    def of(cls, mapping: Mapping[str, str] | None) -> "Columns":
        """The columns under a mapping from fields to columns; fields that it leaves out keep their known names.

        A field may be given by any of its known names ("instruction" is "prompt"). A conversation (`messages`) and a
        pair (`prompt`, `response`, ...) exclude each other, so mapping one also stops the other from being read. Raises
        UserError for a name that is no field's, and for a field or a column that is named twice.
        """
        if mapping is not None and not isinstance(mapping, Mapping):
            raise UserError(f"columns is {shown(mapping)}: pass a dict, such as {{'prompt': 'user_text'}}")
        column_of: dict[str, str] = {}
        for name, column in (mapping or {}).items():
            field = _FIELDS.get(name) if isinstance(name, str) else None
            if field is None:
                raise UserError(f"no field of a row is named {shown(name)}; {hint(name, _FIELDS)}")
            if not isinstance(column, str) or not column:
                raise UserError(f"the column of {name!r} is {shown(column)}: pass its name")
            if field in column_of:
                raise UserError(f"{name!r} is the same field as another that is mapped, {field!r}: map it once")
            if column in column_of.values():
                raise UserError(f"the column {shown(column)} is mapped twice: map it to one field")
            column_of[field] = column
        pair = column_of.keys() & _PAIR
        if "messages" in column_of and pair:
            raise UserError(f"'messages' is a whole conversation: map either it or {min(pair)!r}")
        taken = tuple(column_of.values())
        columns = {field: tuple(name for name in names if name not in taken) for field, names in _KNOWN.items()}
        columns |= dict.fromkeys(_PAIR if "messages" in column_of else ("messages",) if pair else (), ())
        return cls(**columns | {field: (column,) for field, column in column_of.items()}, mapped=taken)


KNOWN = Columns()
_KNOWN = {name: names for name, names in vars(KNOWN).items() if names}
_FIELDS = {name: field for field, names in _KNOWN.items() for name in names}
_PAIR = ("prompt", "response", "input", "history")

HOW = (
    "to map other columns, append them to the file's name: FILE:prompt=COLUMN,response=COLUMN (in Python, "
    'load_rows(FILE, columns={"prompt": "COLUMN", ...}))'
)
"""The end of an error message about unknown columns."""

_BEGIN = re.compile(r"(?<=.):(?=\s*\w+\s*=)", re.DOTALL)
_ITEM = re.compile(r'\s*(?P<field>\w+)\s*=\s*(?:"(?P<quoted>(?:[^"]|"")*)"|(?P<plain>[^",][^,]*)?)\s*(?:,|\Z)')


def without_columns(source: str) -> str:
    """The file, URL or name of a source, without the columns that follow it."""
    names = [source[: colon.start()] for colon in _BEGIN.finditer(source)]
    if not names or _exists(source):
        return source
    return names[0] if len(names) == 1 else next(filter(_exists, reversed(names)), names[0])


def split_columns(source: str) -> tuple[str, dict[str, str]]:
    """A source and the mapping from fields to columns that follows it ("rows.csv:prompt=user_text"); {} if none does.

    A column whose name begins with a quotation mark or a space, ends with a space or has a comma is quoted as in CSV:
    rows.csv:prompt="Question, asked". If a file with the whole name exists, it is that file. Raises UserError for a
    mapping that cannot be read.
    """
    name = without_columns(source)
    if name == source:
        file, colon, _ = source.rpartition(":")
        if colon and os.path.isfile(expanded(file)) and not _exists(source):
            raise UserError(f"{source!r} names no columns after the colon: write {file}:prompt=COLUMN,response=COLUMN")
        return source, {}
    text, mapping, start = source[len(name) + 1 :], dict[str, str](), 0
    while start < len(text):
        item = _ITEM.match(text, start)
        column = "" if item is None else (item["plain"] or "").rstrip() or (item["quoted"] or "").replace('""', '"')
        if item is None or not column or (text.endswith(",") and item.end() == len(text)):
            raise UserError(
                f"{name} is followed by {shown(text)}: write FIELD=COLUMN,FIELD=COLUMN, and a column with a comma in "
                'quotation marks, FIELD="COLUMN"'
            )
        if item["field"] in mapping:
            raise UserError(f"{name} is followed by {item['field']!r} twice: map it once")
        mapping[item["field"]] = column
        start = item.end()
    return name, mapping


def hint(name: Any, known: Iterable[str]) -> str:
    """The known names, and the one that was probably meant, to end an error message."""
    known = list(known)
    nearest = nearest_name(name, known)
    return f"available: {', '.join(known)}" + ("" if nearest is None else f" (did you mean {nearest!r}?)")


def _exists(source: str) -> bool:
    return exists(source) if is_url(source) else os.path.exists(expanded(source))
