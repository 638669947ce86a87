"""What a row is, and how any record becomes one.

A row is a conversation, `{"messages": [{"role": ..., "content": ...}, ...]}`, whatever it was before. A row that
ends with the user's turn has no answer yet: good for scoring, useless for training.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict, overload

from secvec_jax.errors import UserError


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Row(TypedDict):
    """One conversation; `category` only where its source sorts the prompts, `options` where it gives a choice."""

    messages: list[Message]
    category: NotRequired[str]
    options: NotRequired[list[str]]


def row(prompt: str, response: str | None = None) -> Row:
    """Return a single-turn row, without an answer if `response` is None."""
    messages: list[Message] = [{"role": "user", "content": prompt}]
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    return {"messages": messages}


def choice(passage: str, question: str, options: list[str], answer: str, category: str) -> Row:
    """Return a row that asks for one of some options, which have no letter, lest it be the answer."""
    lines = [passage, question, *(f"- {option}" for option in options), "Answer with one of the options."]
    return {**row("\n".join(lines), answer), "category": category, "options": options}


def prompt_of(row: Row) -> str:
    """Return the text of the last user turn."""
    return next(turn["content"] for turn in reversed(row["messages"]) if turn["role"] == "user")


def response_of(row: Row) -> str | None:
    """Return the text of the final assistant turn, or None if the row ends with another."""
    last = row["messages"][-1]
    return last["content"] if last["role"] == "assistant" else None


@overload
def with_system(asked: Row, text: str) -> Row: ...
@overload
def with_system(asked: str | list[Message], text: str) -> list[Message]: ...
def with_system(asked: Row | str | list[Message], text: str) -> Row | list[Message]:
    """Return a row, or a prompt (a text, or a conversation) as a conversation, behind a system message of `text`.

    A system message that it begins with stays, on a line of its own behind `text` in the same message: chat
    templates take no second one.
    """
    if isinstance(asked, dict):
        return {**asked, "messages": with_system(asked["messages"], text)}
    messages = row(asked)["messages"] if isinstance(asked, str) else asked
    if messages and messages[0]["role"] == "system":
        text, messages = f"{text}\n{messages[0]['content']}", messages[1:]
    return [{"role": "system", "content": text}, *messages]


ACCEPTED_FORMS = (
    "a row needs `messages` (a list of role and content), or `prompt` and `response`, or `instruction` and `output`"
)
_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
}
_ANSWER_FIELDS = {
    "prompt": ("response", "completion"),
    "question": ("answer",),
    "goal": ("target",),
    "instruction": ("output",),
}


def normalize(record: Any, where: str) -> Row:
    """Return the row that a record stands for; `where` says in errors which record it was.

    Accepted are `messages` (or `conversations` with from and value), `prompt` with `response` or
    `completion`, `question` with `answer`, `goal` with `target`, and `instruction` with `input` and
    `output`. A record without an answer becomes a row without one; a `category` that is text and `options`
    that are a list of texts are kept. Raises UserError for any other fields and for values that are not text.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: found {type(record).__name__} instead of fields; {ACCEPTED_FORMS}")
    for field, role_key, text_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        if record.get(field) is not None:
            return _keep_extras(record, _from_turns(record[field], role_key, text_key, where))
    for field, answers in _ANSWER_FIELDS.items():
        if record.get(field) is not None:
            return _keep_extras(record, _from_pair(record, field, answers, where))
    found = ", ".join(sorted(" ".join(str(key).split()) for key in record)) or "none"
    raise UserError(f"{where}: unknown fields (found: {found}); {ACCEPTED_FORMS}")


class Rows(Sequence[Row]):
    """Rows on disk, read one by one whenever they are asked for: there may be more than memory holds."""

    def __init__(self, read: Callable[[int], Row], count: int):
        self._read, self._count = read, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        places = range(self._count)[index]
        return self._read(places) if isinstance(places, int) else [self._read(place) for place in places]


def as_rows(data: Iterable[Mapping[str, Any]], needs_answer: bool = True, name: str = "data") -> Sequence[Row]:
    """Return the rows of a list of dicts or a `datasets.Dataset`; `name` is what errors call it.

    A `Dataset` stays where it is, which is on disk as a rule: its records are read once to be checked, and again as
    rows whenever they are asked for. Raises UserError if there are none, if a record cannot be read, or if
    `needs_answer` and a row has no answer.
    """
    if isinstance(data, str | Mapping) or not isinstance(data, Iterable):
        found = type(data).__name__
        raise UserError(f"{name} must be a list of dicts or one split of a data set, found {found}")
    if isinstance(data, Rows):
        return data
    if hasattr(data, "num_rows") and hasattr(data, "features"):
        return on_disk(data, needs_answer, name)
    return collect(numbered(data, name), needs_answer, name)


def on_disk(data: Any, needs_answer: bool, name: str) -> Rows:
    """The rows of a `datasets.Dataset`, each of which has been checked; raises UserError as `as_rows` does."""
    count = sum(1 for _ in checked(numbered(data, name), needs_answer, name))
    return Rows(lambda index: normalize(data[index], name), count)


def numbered(records: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    """Each record behind the words that say where it stands."""
    return ((f"{name}, row {number}", record) for number, record in enumerate(records, 1))


def collect(records: Iterable[tuple[str, Any]], needs_answer: bool, name: str) -> list[Row]:
    """The rows of `numbered` records; raises UserError as `as_rows` does."""
    return list(checked(records, needs_answer, name))


def checked(records: Iterable[tuple[str, Any]], needs_answer: bool, name: str) -> Iterator[Row]:
    """The rows of `numbered` records one by one; raises UserError as `as_rows` does."""
    empty = True
    for where, record in records:
        normalized, empty = normalize(record, where), False
        if needs_answer and not (response_of(normalized) or "").strip():
            raise UserError(f"{where} has no answer; add one, or load prompts alone with needs_answer=False")
        yield normalized
    if empty:
        raise UserError(f"{name} holds no rows; {ACCEPTED_FORMS}")


def _from_turns(turns: Any, role_key: str, text_key: str, where: str) -> Row:
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, Mapping) for turn in turns):
        raise UserError(f"{where}: a conversation must be a list of turns; {ACCEPTED_FORMS}")
    messages: list[Message] = []
    for turn in turns:
        role = _ROLES.get(str(turn.get(role_key)))
        if role is None:
            raise UserError(f"{where}: unknown role {turn.get(role_key)!r}; use system, user or assistant")
        messages.append({"role": role, "content": _text(turn.get(text_key), text_key, where)})
    if not any(message["role"] == "user" for message in messages) or messages[-1]["role"] == "system":
        raise UserError(f"{where}: a conversation must have a user's turn and end with it or an assistant's")
    return {"messages": messages}


def _from_pair(record: Mapping[str, Any], field: str, answers: tuple[str, ...], where: str) -> Row:
    prompt = _text(record[field], field, where)
    if field == "instruction" and record.get("input"):
        prompt += "\n" + _text(record["input"], "input", where)
    if not prompt.strip():
        raise UserError(f"{where}: `{field}` is empty; write a prompt or remove the row")
    answer = next((name for name in answers if record.get(name) not in (None, "")), None)
    return row(prompt, None if answer is None else _text(record[answer], answer, where))


def _keep_extras(record: Mapping[str, Any], row: Row) -> Row:
    category, options = record.get("category"), record.get("options")
    if isinstance(category, str):
        row["category"] = category
    if isinstance(options, list | tuple) and all(isinstance(option, str) for option in options):
        row["options"] = list(options)
    return row


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: `{field}` must be text, found {type(value).__name__}; {ACCEPTED_FORMS}")
    return value
