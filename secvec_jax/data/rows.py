"""Rows, the one form of all data.

A row is a conversation, `{"messages": [{"role": ..., "content": ...}, ...]}`, whatever it was before. A row that
ends with the user's turn has no answer yet: good for scoring, useless for training.
"""

from typing import Literal, NotRequired, TypedDict, overload

Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """One turn of a conversation; `train` is present, and false, where the assistant's words are not to be learned."""

    role: Role
    content: str
    train: NotRequired[bool]


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
    """Return a row that asks for one of the options. They have no letters: the answer is an option's text."""
    lines = [passage, question, *(f"- {option}" for option in options), "Answer with one of the options."]
    return {**row("\n".join(lines), answer), "category": category, "options": options}


def prompt_of(row: Row) -> str:
    """Return the text of the last user turn."""
    return next(turn["content"] for turn in reversed(row["messages"]) if turn["role"] == "user")


def response_of(row: Row) -> str | None:
    """Return the text of the final assistant turn, or None if the row ends with another."""
    last = row["messages"][-1]
    return last["content"] if last["role"] == "assistant" else None


def full_prompt_of(row: Row) -> str | list[Message]:
    """Return the prompt of a row: everything before the final answer.

    A single user turn is its text alone; anything else is the conversation, with its system prompt and earlier turns.
    """
    messages = row["messages"] if response_of(row) is None else row["messages"][:-1]
    return messages[0]["content"] if len(messages) == 1 and messages[0]["role"] == "user" else messages


def last_user_text(prompt: str | list[Message]) -> str:
    """Return the text of the last user turn of a prompt."""
    return prompt if isinstance(prompt, str) else prompt_of({"messages": prompt})


def transcript(prompt: str | list[Message]) -> str:
    """Return a prompt as one text for a reader: a text unchanged, a conversation with its roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in prompt)


@overload
def with_system(prompt: Row, text: str) -> Row: ...
@overload
def with_system(prompt: str | list[Message], text: str) -> list[Message]: ...
def with_system(prompt: Row | str | list[Message], text: str) -> Row | list[Message]:
    """Return a row, or a prompt (a text, or a conversation) as a conversation, after a system message of `text`.

    An existing system message is kept, on a separate line after `text` in the same message: chat templates allow only
    one.
    """
    if isinstance(prompt, dict):
        return {**prompt, "messages": with_system(prompt["messages"], text)}
    messages = row(prompt)["messages"] if isinstance(prompt, str) else prompt
    if messages and messages[0]["role"] == "system":
        text, messages = f"{text}\n{messages[0]['content']}", messages[1:]
    return [{"role": "system", "content": text}, *messages]
