"""Chat templates: rendering turns as text, the tokens that end a reply, and the answer after a model's thought."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from secvec_jax.errors import UserError
from secvec_jax.limits import run_limited

LONGEST_TEXT = 2**24
"""Limit for a rendered conversation in characters, a few million tokens."""
_MAX_TEMPLATE = 2**20
"""Limit for a chat template in characters; published ones have up to a few ten thousand."""
_SECONDS, _MEMORY = 10.0, 2**30
"""Limits for one rendering. A template is a program that came with the model; normal ones take milliseconds."""
_CONTENT = "said"


def chat_template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template: its only one, or of several the one named "default".

    Raises UserError if none of several has this name, and for one that is not usable.
    """
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return _checked(template) if template else None
    if "default" not in template:
        raise UserError(
            f"the tokenizer has several chat templates ({', '.join(sorted(template))}) and none is named default: "
            "set tokenizer.chat_template to one of them, or write it into chat_template.jinja"
        )
    return _checked(template["default"])


def _checked(template: Any) -> str:
    if not isinstance(template, str):
        raise UserError(f"the tokenizer's chat template must be text, found {type(template).__name__}")
    problem = _problem_of(template)
    if problem:
        raise UserError(f"the model's chat template {problem}: use another one, in chat_template.jinja")
    return template


@functools.lru_cache(maxsize=8)
def _problem_of(template: str) -> str:
    """Why a template is refused without rendering it, or ""."""
    if len(template) > _MAX_TEMPLATE:
        return f"has {len(template):,} characters, more than the limit of {_MAX_TEMPLATE:,}"
    # One power of whole numbers can take hours in a single operation, which no time limit can end.
    import jinja2

    before = ""
    try:
        for _, kind, token in jinja2.Environment().lex(template):
            if token == "**" and kind == "operator" and before not in ("(", ","):  # those unpack arguments
                return "computes a power (**), which conversations do not need"
            before = before if kind == "whitespace" else token
    except jinja2.TemplateError:
        pass  # it is reported where the template is rendered
    return ""


def render(
    tokenizer: Any, messages: Sequence[Any], add_generation_prompt: bool = False, continue_final_message: bool = False
) -> str:
    """The turns as one text.

    Raises UserError if there is no template, if it rejects these turns, and if it takes too long or writes too much.
    """
    template = chat_template(tokenizer)
    if template is None:
        raise UserError("the tokenizer has no chat template: use an instruct model, or add a chat_template.jinja")
    try:
        text: str = run_limited(
            lambda: tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            ),
            _SECONDS,
            _MEMORY,
        )
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"it writes {len(text):,} characters, more than the limit of {LONGEST_TEXT:,}")
        return text
    except Exception as error:  # a template is a program, which may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        roles = ", ".join(str(turn.get("role")) for turn in messages[:4]) + (", ..." if len(messages) > 4 else "")
        raise UserError(f"the model's chat template does not take these turns ({roles}): {reason[:300]}") from error


def check_rendered(text: str, messages: Sequence[Any]) -> None:
    """Raise UserError if the rendered text leaves out a turn: some templates skip roles that they do not know.

    Turns of the assistant are not checked: templates leave out earlier thoughts. Others may trim or escape a text.
    """
    contents = "\0".join(str(turn["content"]).strip() for turn in messages if turn["role"] != "assistant")
    for turn in messages:
        content = str(turn["content"]).strip()
        if turn["role"] == "assistant" or not content:
            continue
        if content in text:  # as often as in all turns together: another one may have its words
            is_there = text.count(content) >= contents.count(content)
        else:
            is_there = all(word in text for word in re.findall("[A-Za-z0-9]+", content) or [content])
        if not is_there:
            raise UserError(
                f"the model's chat template leaves out what the {turn['role']} turn says, so it would have no effect: "
                "leave that turn out, or use a template that takes it, in chat_template.jinja"
            )


def read_by_tokenizer(read: Callable[[], Any]) -> Any:
    """The result of a tokenizer's call, with its errors raised as UserError."""
    try:
        return read()
    except BaseException as error:  # tokenizers raises errors worded for Rust, among them panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnicodeEncodeError | TypeError):
            reason = "it has an unpaired surrogate, such as half of an emoji"
        raise UserError(f"the tokenizer cannot read the text: {reason[:300]}") from error


def turn_ends(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a reply: the one that the chat template puts after it, then the tokenizer's `eos_token`.

    In ChatML and Llama templates both are the same token. Gemma and Phi-3 end a turn with a separate token. Without a
    template, or where it ends turns with plain text, only the `eos_token` is returned.
    """
    return _turn_ends(tokenizer, chat_template(tokenizer), state_of(tokenizer))


def state_of(tokenizer: Any) -> tuple[Any, ...]:
    """The state of a tokenizer, besides its template, that a user may change; part of the keys of cached results."""
    return tokenizer.eos_token_id, len(tokenizer), tuple(tokenizer.all_special_ids)


@functools.lru_cache(maxsize=8)
def _turn_ends(tokenizer: Any, template: str | None, state: tuple[Any, ...]) -> tuple[int, ...]:
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    if not template:
        return end
    chat = [{"role": "user", "content": "asked"}, {"role": "assistant", "content": _CONTENT}]
    text_after = render(tokenizer, chat).rpartition(_CONTENT)[2].lstrip()
    tokens_after = read_by_tokenizer(lambda: tokenizer.encode(text_after, add_special_tokens=False))
    template_end = [token for token in tokens_after[:1] if token in tokenizer.added_tokens_decoder]
    return tuple(dict.fromkeys([*template_end, *end]))


_THOUGHTS = (
    ("<think>", "</think>"),  # Qwen3, DeepSeek-R1 and most others
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
)
"""The marks that begin and end a thought, in models that write one before the answer."""
_BEGINS = re.compile("|".join(re.escape(begin) for begin, _ in _THOUGHTS), re.IGNORECASE)
_ENDS = re.compile("|".join(re.escape(end) for _, end in _THOUGHTS), re.IGNORECASE)


def answer_of(reply: str) -> str:
    """Return the answer of a reply, without its thought: "<think>Hm.</think> Paris" gives "Paris".

    The answer is what follows the last end mark. A reply that begins a thought and does not end it has no answer: "".
    """
    *_, end = [None, *_ENDS.finditer(reply)]
    if end is not None:
        return reply[end.end() :].strip()
    return "" if in_thought(reply) else reply


def in_thought(reply: str) -> bool:
    """Return whether a reply stops within its thought, before any answer."""
    return _BEGINS.match(reply.lstrip()) is not None and _ENDS.search(reply) is None


def begun_thought(tokenizer: Any, messages: Any) -> str:
    """Return the mark that begins a thought at the end of the prompt for `messages`, or "" if there is none."""
    prompt = render(tokenizer, messages, add_generation_prompt=True).rstrip()
    return next((begin for begin, _ in _THOUGHTS if prompt.endswith(begin)), "")


def empty_thought(tokenizer: Any) -> int:
    """Return how many tokens an empty thought takes in the chat template, 0 if the template does not write one.

    Some templates write "<think>", blank lines and "</think>" before each answer that has no thought. A model that was
    trained on such answers generates these tokens first.
    """
    if not chat_template(tokenizer):
        return 0
    asked = [{"role": "user", "content": "asked"}]
    prompt = render(tokenizer, asked, add_generation_prompt=True)
    chat = [*asked, {"role": "assistant", "content": _CONTENT}]
    answered = render(tokenizer, chat)
    before = answered.rpartition(_CONTENT)[0].removeprefix(prompt) if answered.startswith(prompt) else ""
    return len(tokenizer.encode(before, add_special_tokens=False)) if _ENDS.search(before) else 0


def special_marks(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the marks of a thought that are special tokens of the tokenizer."""
    marks = {mark for pair in _THOUGHTS for mark in pair}
    return frozenset(
        id for id, token in tokenizer.added_tokens_decoder.items() if token.special and token.content in marks
    )
