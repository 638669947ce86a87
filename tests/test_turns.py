"""A reply ends with the token that the chat template puts after it, or with the end of a text."""

import numpy as np
import pytest

from secvec_jax.data.chat import encode
from secvec_jax.turns import turn_ends
from tests.toys import build_tokenizer

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}END{% endfor %}"


def tokenizer(template: str | None, eos: str | None = "<|endoftext|>"):
    made = build_tokenizer()
    made.chat_template, made.eos_token = template, eos
    return made


@pytest.mark.parametrize(
    ("template", "eos", "ends"),
    [
        (TURNS.replace("END", "<|im_end|>\n"), "<|im_end|>", ["<|im_end|>"]),  # ChatML, Llama 3
        (TURNS.replace("END", "<|im_end|>\n"), "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"]),  # Gemma
        (TURNS.replace("END", "<|im_end|>\n") + "{{ eos_token }}", "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"]),
        (TURNS.replace("END", " {{ eos_token }}"), "<|endoftext|>", ["<|endoftext|>"]),  # Mistral
        (TURNS.replace("END", "\n\n"), "<|endoftext|>", ["<|endoftext|>"]),
        (None, "<|endoftext|>", ["<|endoftext|>"]),
        (None, None, []),
    ],
    ids=["chatml", "gemma", "phi3", "mistral", "plain text", "no template", "no end"],
)
def test_a_reply_ends_where_its_template_ends_it(template, eos, ends):
    made = tokenizer(template, eos)
    assert [made.decode(token) for token in turn_ends(made)] == ends


def test_the_turn_of_a_changed_template_is_found_anew():
    made = tokenizer(TURNS.replace("END", "<|im_end|>"))
    before = turn_ends(made)
    made.chat_template = TURNS.replace("END", "<|im_start|>")
    assert [made.decode(token) for token in (before[0], turn_ends(made)[0])] == ["<|im_end|>", "<|im_start|>"]


def test_the_end_of_the_turn_is_learned_and_the_end_of_the_text_behind_it_is_not():
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    made = tokenizer(
        TURNS.replace("END", "<|im_end|>\n") + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}" + prompt
    )
    row = encode(made, CHAT, 100)
    learned = made.decode(row.tokens[np.asarray(row.supervised)])
    assert learned == "b<|im_end|>"
