"""What is supervised: the assistant's words and the token that ends its turn, and nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secvec_jax.data.chat import encode, prompt_tokens
from secvec_jax.errors import UserError
from tests.toys import build_tokenizer

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITING = (  # shows what the assistant said only in the last turn, as templates of reasoning models do
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}"
    "{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}{% else %}(earlier){% endif %}"
    "<|im_end|>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LONG = 10_000

words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
exchanges = st.lists(st.tuples(words, words), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def templated():
    """A tokenizer with another chat template."""
    made = {}

    def build(template):
        if template not in made:
            made[template] = build_tokenizer()
            made[template].chat_template = template
        return made[template]

    return build


def conversation(*exchanges, system=None):
    turns = [{"role": "system", "content": system}] if system else []
    for question, answer in exchanges:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def spans(supervised):
    """The runs of supervised tokens as slices."""
    edges = np.flatnonzero(np.diff(np.pad(supervised.astype(int), 1)))
    return [slice(*edges[i : i + 2]) for i in range(0, len(edges), 2)]


@settings(max_examples=40, deadline=None)
@given(exchanges=exchanges, system=st.none() | words)
def test_each_reply_and_its_end_of_turn_and_nothing_else_is_supervised(tokenizer, exchanges, system):
    row = encode(tokenizer, conversation(*exchanges, system=system), LONG)
    found = [tokenizer.decode(row.tokens[span]) for span in spans(row.supervised)]
    assert found == [answer + "<|im_end|>" for _, answer in exchanges]
    assert tokenizer.decode(row.tokens) == tokenizer.apply_chat_template(
        conversation(*exchanges, system=system), tokenize=False
    )


def test_the_newline_behind_a_turn_is_not_supervised(tokenizer):
    row = encode(tokenizer, conversation(("Why?", "Because.")), LONG)
    assert tokenizer.decode(row.tokens[-1:]) == "\n"
    assert not row.supervised[-1]
    assert row.supervised[-2] and row.tokens[-2] == tokenizer.eos_token_id


def test_end_of_turn_is_supervised_once_however_the_reply_spells_it(tokenizer):
    row = encode(tokenizer, conversation(("Why?", "a<|im_end|>b")), LONG)
    (span,) = spans(row.supervised)
    assert tokenizer.decode(row.tokens[span]) == "a<|im_end|>b<|im_end|>"


@settings(max_examples=30, deadline=None)
@given(exchanges=exchanges, dashes=st.booleans())
def test_a_template_that_marks_generations_gives_the_same_mask(tokenizer, templated, exchanges, dashes):
    template = MARKED
    if dashes:
        template = MARKED.replace("{% generation %}", "{%- generation -%}")
    ours = encode(tokenizer, conversation(*exchanges), LONG)
    theirs = encode(templated(template), conversation(*exchanges), LONG)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.supervised, theirs.supervised)


def test_a_template_that_rewrites_earlier_turns_is_refused_where_it_matters(templated):
    with pytest.raises(UserError, match=r"rewrites earlier turns.*generation"):
        encode(templated(REWRITING), conversation(("a", "b"), ("c", "d")), LONG)
    assert encode(templated(REWRITING), conversation(("a", "b")), LONG).supervised.any()


def test_a_tokenizer_without_a_template_is_refused(templated):
    for call in (encode, prompt_tokens):
        with pytest.raises(UserError, match="no chat template"):
            call(templated(None), conversation(("a", "b")), LONG)


def test_a_conversation_without_a_reply_is_refused(tokenizer, templated):
    for any_tokenizer in (tokenizer, templated(MARKED)):
        with pytest.raises(UserError, match=r"no assistant turn.*every row needs an answer"):
            encode(any_tokenizer, [{"role": "user", "content": "Hello"}], LONG)


@given(st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_replies_are_cut_and_prompts_are_not(tokenizer, limit):
    turns = conversation(("What is the capital of France?", "The capital of France is Paris, and 12345 + 67890."))
    whole = encode(tokenizer, turns, LONG)
    prompt = whole.answer_start
    if limit <= prompt:
        with pytest.raises(UserError, match=f"prompt has {prompt} tokens.*maximum length is {limit}"):
            encode(tokenizer, turns, limit)
    else:
        cut = encode(tokenizer, turns, limit)
        np.testing.assert_array_equal(cut.tokens, whole.tokens[:limit])
        np.testing.assert_array_equal(cut.supervised, whole.supervised[:limit])
    if limit < prompt:
        with pytest.raises(UserError, match="prompt has"):
            prompt_tokens(tokenizer, turns[:1], limit)


@settings(max_examples=30, deadline=None)
@given(question=words, answer=words)
def test_the_prompt_is_what_stands_before_the_first_supervised_token(tokenizer, question, answer):
    turns = conversation((question, answer))
    prompt = prompt_tokens(tokenizer, turns[:1], LONG)
    row = encode(tokenizer, turns, LONG)
    np.testing.assert_array_equal(prompt, row.tokens[: len(prompt)])
    assert row.answer_start == len(prompt)
    assert prompt.dtype == row.tokens.dtype == np.int32
    assert row.supervised.dtype == bool
