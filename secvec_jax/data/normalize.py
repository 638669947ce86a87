"""The normalization of records of any accepted form into rows."""

from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from secvec_jax.data.columns import HOW, KNOWN, Columns, hint
from secvec_jax.data.fields import check_record, check_turn, is_empty, is_learned, meant
from secvec_jax.data.frames import records_of
from secvec_jax.data.rows import Message, Role, Row, response_of, row
from secvec_jax.data.stored import Rows, location
from secvec_jax.errors import UserError

LONGEST_ROW = 2**23
"""Limit for a row in characters, a few million tokens; a tokenizer takes a hundred times as many bytes of memory."""
ACCEPTED_FORMS = (
    "a row needs `messages` (a list of role and content), or `prompt` and `response`, or `instruction` and `output`"
)
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
}


def normalize(record: Any, where: str, ignore: Collection[str] = (), columns: Columns = KNOWN) -> Row:
    """Return the row that a record represents; `where` says in errors which record it was.

    Accepted are `messages` or `conversations` (turns with role and content, or from and value), and `prompt`,
    `question`, `goal` or `instruction` with `response`, `completion`, `answer`, `target` or `output`. A prompt and its
    answer may be turns as well: then only the answer's are learned. `system` (or `system_prompt`) goes in front,
    `input` or `context` after the prompt, `history` ([[question, answer], ...]) before it. A record without an answer
    becomes a row without one; a `category` that is text and `options` that are a list of texts are kept. `columns` maps
    these fields to other names in the record.

    Raises UserError for values that are not text, for text of more than `LONGEST_ROW` characters, for values that are
    nested too deep, and for fields other than these that may change what is to be learned (see `fields`), unless
    `ignore` names them.
    """
    try:
        normalized = _normalized(record, where, ignore, columns)
    except RecursionError:
        raise UserError(f"{where} is nested too deep for a row; correct or remove it") from None
    length = sum(len(message["content"]) for message in normalized["messages"])
    if length > LONGEST_ROW:
        raise UserError(
            f"{where} has {length:,} characters, more than the limit of {LONGEST_ROW:,}; split or remove it"
        )
    return normalized


def _normalized(record: Any, where: str, ignore: Collection[str], columns: Columns) -> Row:
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: found {type(record).__name__} instead of fields; {ACCEPTED_FORMS}")
    if columns.mapped:
        ignore = [name for name in ignore if name not in columns.mapped]
    asked = (*columns.messages, *columns.prompt)
    field = next((name for name in asked if record.get(name) is not None and name not in ignore), None)
    if field is None and any(name in columns.mapped for name in asked):
        raise UserError(f"{where}: the column {asked[0]!r} is missing or empty (found: {_names(record)})")
    if field is None:
        raise UserError(f"{where}: unknown fields (found: {_names(record)}){meant(record)}; {ACCEPTED_FORMS}; {HOW}")
    if field in columns.prompt:
        messages, used = _from_pair(record, field, where, ignore, columns)
    else:
        messages, used = _turns(record[field], where, ignore), [field]
    system = [name for name in columns.system if not is_empty(record.get(name)) and name not in ignore]
    if system:
        messages = _with_system_prompt({_text(record[name], name, where) for name in system}, messages, where)
    check_record(record, [*used, *system], where, ignore)
    if not any(message["role"] == "user" for message in messages) or messages[-1]["role"] == "system":
        raise UserError(f"{where}: a conversation must have a user turn, and end with a user or assistant turn")
    return _keep_extras(record, {"messages": messages}, where)


def as_rows(
    data: Iterable[Mapping[str, Any]],
    needs_answer: bool = True,
    name: str = "data",
    ignore_fields: Collection[str] = (),
    columns: Mapping[str, str] | None = None,
) -> Rows[Row]:
    """Return the rows of a list of dicts, a data frame or a `datasets.Dataset`; `name` is its name in errors.

    `Rows` are returned as they are. A `Dataset` is not copied into memory: its records are read once to be
    checked, and again on each access. ignore_fields: fields that `normalize` may leave out. columns: which column
    each field of a row is read from, {"prompt": "user_text", "response": "agent_text"}, where they have other names.
    Raises UserError if there are no rows, if a record cannot be read, if no record has a column that is mapped, or if
    `needs_answer` and a row has no answer.
    """
    named = Columns.of(columns)
    data = records_of(data)
    if isinstance(data, str | Mapping) or not isinstance(data, Iterable):
        kind = type(data).__name__
        raise UserError(f"{name} must be a list of dicts or one split of a dataset, found {kind}")
    if isinstance(data, Rows):
        if named.mapped:
            raise UserError(f"{name} was read before: map its columns where it is read, or pass the records themselves")
        return _checked_again(data, needs_answer, name)
    if hasattr(data, "num_rows") and hasattr(data, "features"):
        return rows_on_disk(data, needs_answer, name, ignore_fields, named)
    return rows_in_memory(enumerate(data, 1), needs_answer, name, ignore_fields=ignore_fields, columns=named)


def rows_on_disk(
    data: Any, needs_answer: bool, name: str, ignore_fields: Collection[str] = (), columns: Columns = KNOWN
) -> Rows[Row]:
    """The rows of a `datasets.Dataset`, each of which has been checked; raises UserError as `as_rows` does."""

    def read(index: int) -> Row:
        return normalize(data[index], location(name, index + 1), ignore_fields, columns)

    count = sum(1 for _ in normalized_rows(enumerate(data, 1), needs_answer, name, "row", ignore_fields, columns))
    return Rows(read, count, lambda index: location(name, index + 1), answered=needs_answer)


def _checked_again(rows: Rows[Row], needs_answer: bool, name: str) -> Rows[Row]:
    """The same rows. Raises UserError if there are none, or for a missing answer where none was required before."""
    if not len(rows):
        raise UserError(f"{name} holds no rows; {ACCEPTED_FORMS}")
    if rows.answered or not needs_answer:
        return rows
    for index, each in enumerate(rows):
        check_answer(each, rows.where(index))
    return Rows(rows.__getitem__, len(rows), rows.where, answered=True)


def rows_in_memory(
    records: Iterable[tuple[int, Any]],
    needs_answer: bool,
    name: str,
    unit: str = "row",
    ignore_fields: Collection[str] = (),
    columns: Columns = KNOWN,
) -> Rows[Row]:
    """The rows of numbered records, in memory; raises UserError as `as_rows` does."""
    numbers = array("Q")

    def noted() -> Iterator[tuple[int, Any]]:
        for number, record in records:
            numbers.append(number)
            yield number, record

    rows = list(normalized_rows(noted(), needs_answer, name, unit, ignore_fields, columns))
    return Rows(rows.__getitem__, len(rows), lambda index: location(name, numbers[index], unit), answered=needs_answer)


def normalized_rows(
    records: Iterable[tuple[int, Any]],
    needs_answer: bool,
    name: str,
    unit: str = "row",
    ignore_fields: Collection[str] = (),
    columns: Columns = KNOWN,
) -> Iterator[Row]:
    """The rows of numbered records one by one; raises UserError as `as_rows` does, after all records are read.

    A record may be the UserError that its reader met. If several records cannot be read, the error says how many, or
    that there are at least `_MAX_COUNTED`, and its notes (`__notes__`) describe up to ten of them. If no record has a
    column that was mapped, that is the error.
    """
    empty, problems, count = True, list[UserError](), 0
    missing, seen = dict.fromkeys(columns.mapped), dict[Any, None]()
    for number, record in records:
        empty = False
        if missing and isinstance(record, Mapping):
            seen |= dict.fromkeys(record) if len(seen) < _MAX_NAMES else {}
            missing = {column: None for column in missing if column not in record}
        try:
            normalized = _checked_row(record, location(name, number, unit), needs_answer, ignore_fields, columns)
        except UserError as error:
            count += 1
            problems += [error] if count <= _MAX_REPORTED else []
            if count == _MAX_COUNTED:
                break
            continue
        if not problems:
            yield normalized
    if empty:
        raise UserError(f"{name} holds no rows; {ACCEPTED_FORMS}")
    if missing and seen:
        column = next(iter(missing))
        where = name if count < _MAX_COUNTED else f"{name}, {unit} 1 to {number}"
        raise UserError(f"no column {column!r} in {where}; {hint(column, map(str, seen))}")
    if count == 1:
        raise problems[0]
    if problems:
        raise _unreadable(name, problems, count)


_MAX_REPORTED = 10
"""Number of unreadable rows that are reported one by one."""
_MAX_COUNTED = 10_000
"""Number of unreadable rows after which reading stops: a file of millions would take minutes to refuse."""
_MAX_NAMES = 1_000
"""Number of column names that suggestions are chosen from."""


def _checked_row(record: Any, where: str, needs_answer: bool, ignore_fields: Collection[str], columns: Columns) -> Row:
    if isinstance(record, UserError):
        raise record
    normalized = normalize(record, where, ignore_fields, columns)
    if needs_answer:
        check_answer(normalized, where)
    return normalized


def _names(record: Iterable[Any]) -> str:
    return ", ".join(sorted(" ".join(str(key).split()) for key in record)) or "none"


def _unreadable(name: str, problems: Sequence[UserError], count: int) -> UserError:
    counted = f"at least {count:,}" if count == _MAX_COUNTED else f"{count:,}"
    error = UserError(f"{counted} rows of {name} cannot be read, the first: {problems[0]}")
    for problem in problems:
        error.add_note(str(problem))
    if count > len(problems):
        error.add_note(f"... and {count - len(problems):,} more rows")
    return error


def check_answer(row: Row, where: str) -> None:
    """Raises UserError if a row has no answer or none that is to be learned, or one to be learned that is empty."""
    if not (response_of(row) or "").strip():
        fix = "add one, or remove the row (in Python, needs_answer=False loads prompts alone)"
        raise UserError(f"{where} has no answer; {fix}")
    assistant_turns = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    if not any(turn.get("train", True) for turn in assistant_turns):
        raise UserError(f"{where} has nothing to learn: every assistant turn is marked as not to be learned; remove it")
    if any(turn.get("train", True) and not turn["content"].strip() for turn in assistant_turns):
        raise UserError(
            f"{where} has an empty assistant turn, which would teach the model to answer nothing: fill it in, mark it "
            'with "train": false, or remove the row'
        )


def _turns(turns: Any, where: str, ignore: Collection[str]) -> list[Message]:
    if not _are_turns(turns):
        raise UserError(f"{where}: a conversation must be a list of turns; {ACCEPTED_FORMS}")
    messages: list[Message] = []
    for turn in turns:
        role_key, text_key = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
        check_turn(turn, (role_key, text_key), where, ignore)
        role = _ROLES.get(str(turn.get(role_key)))
        if role is None:
            named = repr(turn[role_key]) if turn.get(role_key) is not None else f"none, in a turn without `{role_key}`"
            raise UserError(f"{where}: unknown role {named}; use system, user, assistant or tool")
        message: Message = {"role": role, "content": _text(turn.get(text_key), text_key, where)}
        if role == "assistant" and not is_learned(turn, where):
            message["train"] = False
        messages.append(message)
    return messages


def _are_turns(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(turn, Mapping) for turn in value)


def _from_pair(
    record: Mapping[str, Any], field: str, where: str, ignore: Collection[str], columns: Columns
) -> tuple[list[Message], list[str]]:
    """The turns of a prompt, with its context, and its answer; and the fields that were used."""
    others = [name for name in columns.prompt if name != field and name not in ignore]
    if other := next((name for name in others if not is_empty(record.get(name)) and record[name] != record[field]), ""):
        raise UserError(
            f"{where}: two prompts, `{field}` and `{other}`: remove the one that is not asked, which is often a "
            "rendering of the whole row, or name it in --ignore-fields (in Python, ignore_fields)"
        )
    used = [field]
    history: list[Message] = []
    if record[field] and _are_turns(record[field]):  # as in TRL: all of it is context
        prompt_turns = [_not_learned(message) for message in _turns(record[field], where, ignore)]
    else:
        prompt = _text(record[field], field, where)
        for name in columns.input:
            if not is_empty(record.get(name)) and name not in ignore:
                context = "\n" + _text(record[name], name, where)
                prompt += "" if prompt.endswith(context) else context  # not a second time
                used.append(name)
        if not prompt.strip():
            raise UserError(f"{where}: `{field}` is empty; write a prompt or remove the row")
        prompt_turns = row(prompt)["messages"]
        for name in columns.history:
            if not is_empty(record.get(name)) and name not in ignore:
                history = _history(record[name], name, where, ignore)
                used.append(name)
    answers = [name for name in columns.response if record.get(name) not in (None, "") and name not in ignore]
    different = [name for name in answers[1:] if record[name] != record[answers[0]]]
    if different:
        raise UserError(f"{where}: two answers, `{answers[0]}` and `{different[0]}`: keep the one to be learned")
    if not answers:
        return history + prompt_turns, used
    answer = record[answers[0]]
    answer_turns: list[Message]
    if answer and _are_turns(answer):
        answer_turns = _turns(answer, where, ignore)
    else:
        answer_turns = [{"role": "assistant", "content": _text(answer, answers[0], where)}]
    return history + prompt_turns + answer_turns, used + answers


def _history(history: Any, field: str, where: str, ignore: Collection[str]) -> list[Message]:
    """Earlier turns, as [[question, answer], ...] or as messages."""
    if _are_turns(history):
        return _turns(history, where, ignore)
    if not isinstance(history, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in history):
        raise UserError(f"{where}: `{field}` must be a list of [question, answer], or of turns")
    return [
        message
        for question, answer in history
        for message in row(_text(question, field, where), _text(answer, field, where))["messages"]
    ]


def _with_system_prompt(prompts: set[str], messages: list[Message], where: str) -> list[Message]:
    """The turns with the system prompt of a separate field first, unless they already begin with it."""
    first = messages[0] if messages and messages[0]["role"] == "system" else None
    if len(prompts | ({first["content"]} if first else set())) > 1:
        raise UserError(f"{where}: two system prompts that differ; keep one, in `system` or as the first turn")
    return messages if first else [{"role": "system", "content": prompts.pop()}, *messages]


def _not_learned(message: Message) -> Message:
    return {**message, "train": False} if message["role"] == "assistant" else message


def _keep_extras(record: Mapping[str, Any], row: Row, where: str) -> Row:
    category, options = record.get("category"), record.get("options")
    if isinstance(category, str):
        row["category"] = _text(category, "category", where)
    if isinstance(options, list | tuple) and all(isinstance(option, str) for option in options):
        row["options"] = [_text(option, "options", where) for option in options]
    return row


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: `{field}` must be text, found {type(value).__name__}; {ACCEPTED_FORMS}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start].encode("unicode_escape").decode()
        raise UserError(
            f"{where}: `{field}` has an unpaired surrogate ({half}, at {error.start + 1}): the text was cut inside an "
            "emoji or similar character; correct or remove the row"
        ) from None
    return value
