"""What a model's own chat template makes of turns, and where it ends a reply."""

import functools
from collections.abc import Sequence
from typing import Any

from secvec_jax.errors import UserError

_CONTENT = "said"


def chat_template(tokenizer: Any) -> str | None:
    """The tokenizer's template for plain chats: its only one, or of several named ones the default."""
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return template or None
    if "default" not in template:
        raise UserError(
            f"the tokenizer has several chat templates ({', '.join(sorted(template))}) and none is named default: "
            "set tokenizer.chat_template to one of them, or write it into chat_template.jinja"
        )
    return template["default"]


def render(tokenizer: Any, messages: Sequence[Any], add_generation_prompt: bool = False) -> str:
    """The turns as one text. Raises UserError if there is no template, or if it does not take these turns."""
    template = chat_template(tokenizer)
    if template is None:
        raise UserError("the tokenizer has no chat template: use an instruct model, or add a chat_template.jinja")
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program of the model's: it raises what it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        roles = ", ".join(str(turn.get("role")) for turn in messages[:4]) + (", ..." if len(messages) > 4 else "")
        raise UserError(f"the model's chat template does not take these turns ({roles}): {reason[:300]}") from error


def turn_ends(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a reply: the one that the chat template puts behind it, then the end of a text.

    They are one where the template uses the tokenizer's `eos_token`, as ChatML and Llama do. Gemma and Phi-3 end a turn
    with a token of its own. Without a template, or where it ends turns with plain text, the end of a text is all.
    """
    return _turn_ends(tokenizer, chat_template(tokenizer))


@functools.lru_cache(maxsize=8)
def _turn_ends(tokenizer: Any, template: str | None) -> tuple[int, ...]:
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    if not template:
        return end
    chat = [{"role": "user", "content": "asked"}, {"role": "assistant", "content": _CONTENT}]
    behind = tokenizer.encode(render(tokenizer, chat).rpartition(_CONTENT)[2].lstrip(), add_special_tokens=False)
    own = [token for token in behind[:1] if token in tokenizer.added_tokens_decoder]
    return tuple(dict.fromkeys([*own, *end]))
