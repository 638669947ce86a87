"""Which fields of a record and of its turns are used, ignored or refused.

A field that is neither used nor known to be a label of the record (an id, a source, a date) is refused by name: the
system prompt, tool calls or rejected answer that it may hold would otherwise be missing from training without notice.
"""

import datetime
import difflib
import numbers
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from secvec_jax.errors import UserError

LABELS = frozenset(
    "__index_level_0__ author avatarurl behavior category created_at dataset dataset_name date difficulty domain hash "
    "id ids idx index lang language level license locale meta metadata model model_name num_turns options quality "
    "question_id conversation_id prompt_id rating row_id score scores semantic_category source sources subject subset "
    "tag tags task task_category task_type time timestamp title topic topics turn_id type uid updated_at url uuid "
    "version".split()
)
"""Fields that describe a record or a turn without changing its text, in lower case."""

CONVERSATIONS = ("messages", "conversations")
PROMPTS = ("prompt", "question", "goal", "instruction")
ANSWERS = ("response", "completion", "answer", "target", "output")
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt", "system_message")
HISTORIES = ("history",)
_READ = (*CONVERSATIONS, *PROMPTS, *ANSWERS, *CONTEXTS, *SYSTEMS, *HISTORIES)
"""All fields of a record that are read."""

_LEARNED = ("weight", "train", "training", "trainable", "loss")
_NOT_LEARNED = ("masked",)
_RECORD_MARKS = ("weight", "train", "trainable", "masked", "mask", "label")
_ROLES = frozenset(("system", "user", "assistant", "human", "gpt", "tool"))


def check_record(record: Mapping[str, Any], used: Collection[str], where: str, ignore: Collection[str]) -> None:
    """Raise UserError if a record has fields, other than those `used`, that may change what is to be learned.

    Allowed are empty fields, labels, numbers, dates, texts that the used fields hold as well (a prompt next to its
    messages, a rendering of the row), and fields that `ignore` names; "*" allows all.
    """
    used_texts = [text for name in used for text in texts(record[name]) if text.strip() and text not in _ROLES]
    unknown = []
    for name, value in record.items():
        key = str(name).lower()
        if name in used or name in ignore or "*" in ignore or key in LABELS or is_empty(value):
            continue
        if key == "split" and str(value).lower().startswith("train"):
            continue
        if key in _RECORD_MARKS:
            if _flag(value) is (key in _LEARNED) and key != "mask" and key != "label":
                continue
            if key == "label" and not isinstance(value, bool):
                unknown.append(str(name))
                continue
            raise UserError(
                f"{where}: `{name}` is {value!r}, but only turns can have such a mark, not whole rows: remove the rows "
                "that should not be learned, and the field, or name it in --ignore-fields (in Python, ignore_fields)"
            )
        if not (_is_scalar(value) or _is_repeated(value, used_texts)):
            unknown.append(str(name))
    if unknown:
        problem = f"may contain training data but are not read (fields read: {', '.join(map(str, used))})"
        _refuse(unknown, where, problem, ", rename or map them (FILE:FIELD=COLUMN)")


def check_turn(turn: Mapping[str, Any], used: Collection[str], where: str, ignore: Collection[str]) -> None:
    """Raise UserError if a turn has fields that may change what is said or learned, such as tool calls."""
    unknown = [
        str(name)
        for name, value in turn.items()
        if not (name in used or name in ignore or "*" in ignore or str(name).lower() in LABELS or is_empty(value))
        and name not in (*_LEARNED, *_NOT_LEARNED)
    ]
    if unknown:
        _refuse(unknown, where, "of a turn are not read: only its role and text are", " or rename them")


def is_learned(turn: Mapping[str, Any], where: str) -> bool:
    """Whether a turn is to be learned, according to its marks (`weight`, `train`, `masked`, ...).

    Raises UserError for values other than 0, 1, true and false.
    """
    learned = True
    for name in (*_LEARNED, *_NOT_LEARNED):
        if turn.get(name) is not None:
            flag = _flag(turn[name])
            if flag is None:
                raise UserError(f"{where}: `{name}` of a turn is {turn[name]!r}: it must be 0, 1, true or false")
            learned &= flag is not (name in _NOT_LEARNED)
    return learned


def texts(value: Any) -> Iterator[str]:
    """All texts in a value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from texts(item)


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: None, a blank text, or a list or mapping of such values."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return value is None or (isinstance(value, list | tuple) and all(map(is_empty, value)))


def _refuse(unknown: Collection[str], where: str, problem: str, fix: str) -> None:
    named = ", ".join(f"`{' '.join(name.split())}`" for name in sorted(unknown))
    raise UserError(
        f"{where}: unknown fields {named} {problem}{meant(unknown)}; remove{fix}, or name them in "
        "--ignore-fields (in Python, ignore_fields)"
    )


def meant(names: Iterable[Any]) -> str:
    """A suggestion to end a message: the known field that was probably meant by one of the unknown names; or ""."""
    for name in map(str, names):
        closest = difflib.get_close_matches(name.strip().lower(), _READ, 1, 0.8)
        if closest and name not in _READ:
            return f" (did you mean `{closest[0]}` by {name[:40]!r}?)"
    return ""


def _flag(value: Any) -> bool | None:
    """Yes or no; None: neither."""
    if isinstance(value, str):  # as in a CSV file
        value = {"0": False, "1": True, "false": False, "true": True}.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | numbers.Real) and value in (0, 1) else None


def _is_scalar(value: Any) -> bool:
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, bool | numbers.Number | datetime.date | datetime.time)


def _is_repeated(value: Any, used_texts: list[str]) -> bool:
    """Whether a value adds nothing to the texts that are used: each of its texts is part of one of them, or it
    is a rendering of all."""
    if isinstance(value, str) and all(text.strip() in value for text in used_texts):
        return True
    if not isinstance(value, str | Mapping | list | tuple):
        return False
    return all(text in _ROLES or any(text.strip() in one for one in used_texts) for text in texts(value))
