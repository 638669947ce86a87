"""Where a reply ends, by the model's own chat template."""

import functools
from typing import Any

_CONTENT = "said"


def turn_ends(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a reply: the one that the chat template puts behind it, then the end of a text.

    They are one where the template uses the tokenizer's `eos_token`, as ChatML and Llama do. Gemma and Phi-3 end a turn
    with a token of its own. Without a template, or where it ends turns with plain text, the end of a text is all.
    """
    return _turn_ends(tokenizer, tokenizer.chat_template)


@functools.lru_cache(maxsize=8)
def _turn_ends(tokenizer: Any, template: Any) -> tuple[int, ...]:
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    if not template:
        return end
    chat = [{"role": "user", "content": "asked"}, {"role": "assistant", "content": _CONTENT}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    behind = tokenizer.encode(rendered.rpartition(_CONTENT)[2].lstrip(), add_special_tokens=False)
    own = [token for token in behind[:1] if token in tokenizer.added_tokens_decoder]
    return tuple(dict.fromkeys([*own, *end]))
