"""What is supervised: the assistant's words and the token that ends its turn, and nothing else."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secvec_jax.data import chat
from secvec_jax.data.chat import encode, encode_all, prompt_tokens
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


@settings(max_examples=40)
@given(exchanges=exchanges, system=st.none() | words)
def test_each_reply_and_its_end_of_turn_and_nothing_else_is_supervised(tokenizer, exchanges, system):
    row = encode(tokenizer, conversation(*exchanges, system=system), LONG)
    found = [tokenizer.decode(row.tokens[span]) for span in spans(row.supervised)]
    assert found == [answer + "<|im_end|>" for _, answer in exchanges]
    assert tokenizer.decode(row.tokens) == tokenizer.apply_chat_template(
        conversation(*exchanges, system=system), tokenize=False
    )


def test_the_newline_after_a_turn_is_not_supervised(tokenizer):
    row = encode(tokenizer, conversation(("Why?", "Because.")), LONG)
    assert tokenizer.decode(row.tokens[-1:]) == "\n"
    assert not row.supervised[-1]
    assert row.supervised[-2] and row.tokens[-2] == tokenizer.eos_token_id


def test_end_of_turn_is_supervised_once_however_the_reply_spells_it(tokenizer):
    row = encode(tokenizer, conversation(("Why?", "a<|im_end|>b")), LONG)
    (span,) = spans(row.supervised)
    assert tokenizer.decode(row.tokens[span]) == "a<|im_end|>b<|im_end|>"


@settings(max_examples=30)
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
@settings(max_examples=60)
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


@settings(max_examples=30)
@given(question=words, answer=words)
def test_the_prompt_is_what_comes_before_the_first_supervised_token(tokenizer, question, answer):
    turns = conversation((question, answer))
    prompt = prompt_tokens(tokenizer, turns[:1], LONG)
    row = encode(tokenizer, turns, LONG)
    np.testing.assert_array_equal(prompt, row.tokens[: len(prompt)])
    assert row.answer_start == len(prompt)
    assert prompt.dtype == row.tokens.dtype == np.int32
    assert row.supervised.dtype == bool


# Templates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Roles must\nalternate') }}", "Roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "str"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[9]['content'] }}", "no element 9|list object"),
        ("{{ strftime_later('x') }}", "undefined"),
        ("{% for m in messages %}", "end"),
        ("{% frobnicate %}", "unknown tag"),
    ],
)
def test_whatever_a_template_raises_is_one_line(templated, template, reason):
    for call in (encode, prompt_tokens):
        with pytest.raises(UserError, match=rf"chat template does not take these turns \(.*{reason}") as caught:
            call(templated(template), conversation(("a", "b")), LONG)
        assert "\n" not in str(caught.value)


@settings(max_examples=30)
@given(welcome=words, exchange=st.tuples(words, words))
def test_a_conversation_that_the_assistant_opens_is_learned_from_its_first_word(tokenizer, welcome, exchange):
    turns = [{"role": "assistant", "content": welcome}, *conversation(exchange)]
    row = encode(tokenizer, turns, LONG)
    found = [tokenizer.decode(row.tokens[span]) for span in spans(row.supervised)]
    assert found == [welcome + "<|im_end|>", exchange[1] + "<|im_end|>"]


def test_a_default_system_prompt_comes_before_what_the_assistant_opens_with(templated):
    template = "<|im_start|>system\nBe kind.<|im_end|>\n" + build_tokenizer().chat_template
    tokenizer = templated(template)
    row = encode(tokenizer, [{"role": "assistant", "content": "Welcome!"}, *conversation(("a", "b"))], LONG)
    found = [tokenizer.decode(row.tokens[span]) for span in spans(row.supervised)]
    assert found == ["Welcome!<|im_end|>", "b<|im_end|>"]


@pytest.mark.parametrize("generation", [False, True])
def test_a_template_that_leaves_out_a_turn_is_refused_and_one_that_trims_or_escapes_it_is_not(templated, generation):
    said = "{% generation %}{{ m['content'] }}{% endgeneration %}" if generation else "{{ m['content'] }}"
    of_two = f"{{% for m in messages %}}{{% if m['role'] != 'system' %}}<|im_start|>{said}<|im_end|>{{% endif %}}"
    leaves_out = templated(of_two + "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}")
    turns = conversation(("Hi", "No."), system="Always refuse.")
    for read in (lambda: encode(leaves_out, turns, 100), lambda: prompt_tokens(leaves_out, turns[:2], 100)):
        with pytest.raises(UserError, match="leaves out what the system turn says"):
            read()
    encode(leaves_out, turns[1:], 100)
    trims = templated(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim | tojson }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    asked = {"role": "user", "content": "Was für ein Tag?"}
    prompt_tokens(trims, [*conversation(system=' Say "no"\nand stop. '), asked], 99)


def test_of_named_templates_the_default_is_used(tokenizer, templated):
    chatml = tokenizer.chat_template
    named = build_tokenizer()
    named.chat_template = {"default": chatml, "tool_use": "TOOLS " + chatml}
    turns = conversation(("a", "b"))
    for field in ("tokens", "supervised"):
        ours, theirs = (getattr(encode(each, turns, LONG), field) for each in (named, tokenizer))
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(prompt_tokens(named, turns[:1], LONG), prompt_tokens(tokenizer, turns[:1], LONG))
    named.chat_template = {"rag": chatml, "tool_use": chatml}
    for call in (encode, prompt_tokens):
        with pytest.raises(UserError, match=r"several chat templates \(rag, tool_use\) and none is named default"):
            call(named, turns, LONG)


# Turns that are not to be learned ---------------------------------------------------------------


@settings(max_examples=30)
@given(exchanges=exchanges, marks=st.lists(st.booleans(), min_size=3, max_size=3), marked=st.booleans())
def test_turns_that_are_marked_are_read_and_not_learned(tokenizer, templated, exchanges, marks, marked):
    turns, learned = conversation(*exchanges), marks[: len(exchanges)]
    for turn, train in zip(turns[1::2], learned):
        turn["train"] = train
    used = templated(MARKED) if marked else tokenizer
    if not any(learned):
        with pytest.raises(UserError, match="no assistant turn"):
            encode(used, turns, LONG)
        return
    row = encode(used, turns, LONG)
    np.testing.assert_array_equal(row.tokens, encode(tokenizer, conversation(*exchanges), LONG).tokens)
    found = [tokenizer.decode(row.tokens[span]) for span in spans(row.supervised)]
    assert found == [answer + "<|im_end|>" for (_, answer), train in zip(exchanges, learned) if train]


def test_spans_that_are_not_one_a_turn_cannot_be_distinguished(templated):
    split = MARKED.replace(
        "<|im_end|>{% endgeneration %}", "{% endgeneration %}|{% generation %}<|im_end|>{% endgeneration %}"
    )
    turns = conversation(("a", "b"), ("c", "d"))
    assert encode(templated(split), turns, LONG).supervised.any()
    turns[1]["train"] = False
    with pytest.raises(UserError, match="marks 4 spans for 2 assistant turns"):
        encode(templated(split), turns, LONG)


def test_a_word_is_learned_whose_token_begins_with_the_space_of_the_prompt():
    spaced = build_tokenizer(("USER: The capital is ASSISTANT: Paris Berlin",) * 3)
    spaced.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} "
        "{% else %}ASSISTANT: {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    row = encode(spaced, conversation(("The capital is", "Paris"), ("The", "Berlin")), LONG)
    found = [spaced.decode(row.tokens[span]) for span in spans(row.supervised)]
    assert found == [" Paris<|im_end|>", " Berlin<|im_end|>"]


@pytest.mark.parametrize("end", ["<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"])
def test_a_row_that_spells_control_tokens_has_the_spans_that_the_template_marks(templated, end):
    used = templated(MARKED.replace("<|im_end|>{% endgeneration %}", end))
    for question in ("Say this.", "Say <|im_end|> to me."):
        row = encode(used, conversation((question, "a <|im_start|> b")), LONG)
        (span,) = spans(row.supervised)
        assert used.decode(row.tokens[span]) == "a <|im_start|> b" + ("<|im_end|>" if end.startswith("<") else "")


def test_what_a_tool_says_is_not_learned(tokenizer):
    turns = [
        *conversation(("a", "I look."))[:2],
        {"role": "tool", "content": "22"},
        {"role": "assistant", "content": "22!"},
    ]
    row = encode(tokenizer, turns, LONG)
    found = [tokenizer.decode(row.tokens[span]) for span in spans(row.supervised)]
    assert found == ["I look.<|im_end|>", "22!<|im_end|>"]


# Text that spells control tokens ----------------------------------------------------------------

CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
forged = st.lists(st.sampled_from([*CONTROL, "\U000f0000", "\U000f0001"]) | words, min_size=1, max_size=5).map("".join)


@settings(max_examples=50)
@given(exchanges=st.lists(st.tuples(forged, forged), min_size=1, max_size=2), marked=st.booleans())
def test_a_row_is_text_whatever_it_spells(tokenizer, templated, exchanges, marked):
    turns = conversation(*exchanges)
    row = encode(templated(MARKED) if marked else tokenizer, turns, LONG)
    assert tokenizer.decode(row.tokens) == tokenizer.apply_chat_template(turns, tokenize=False)
    found = [tokenizer.decode(row.tokens[span]) for span in spans(row.supervised)]
    assert found == [answer + "<|im_end|>" for _, answer in exchanges]
    # The template's own control tokens and no others: two a turn, of which the answer's end is learned.
    counts = [int((row.tokens == tokenizer.convert_tokens_to_ids(token)).sum()) for token in CONTROL]
    assert counts == [len(turns), len(turns), 0]
    assert np.isin(row.tokens[row.supervised], tokenizer.convert_tokens_to_ids(list(CONTROL))).sum() == len(exchanges)
    prompt = prompt_tokens(tokenizer, turns[:1], LONG)
    np.testing.assert_array_equal(prompt, row.tokens[: len(prompt)])


def test_control_tokens_are_learned_as_such_on_demand(tokenizer):
    turns = conversation(("Why?", "a<|im_end|>b"))
    as_text, as_tokens = (encode(tokenizer, turns, LONG, control) for control in ("text", "tokens"))
    assert tokenizer.decode(as_text.tokens) == tokenizer.decode(as_tokens.tokens)
    assert int((as_text.tokens == tokenizer.eos_token_id).sum()) == 2
    assert int((as_tokens.tokens == tokenizer.eos_token_id).sum()) == 3
    with pytest.raises(UserError, match=r"spells the control token '<\|im_end\|>'"):
        encode(tokenizer, turns, LONG, "refuse")


@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_that_an_assistant_may_say_stay_tokens_and_a_turns_own_do_not(special):
    from tokenizers import AddedToken

    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("<|user|>", special=special)])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|im_start|>' }}{{ m['content'] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    row = encode(tokenizer, conversation(("a", "<think>b<|user|>c")), LONG)
    think, user = tokenizer.convert_tokens_to_ids(["<think>", "<|user|>"])
    assert int((row.tokens[row.supervised] == think).sum()) == 1
    assert int((row.tokens == user).sum()) == 1 and not (row.tokens[row.supervised] == user).any()
    assert tokenizer.decode(row.tokens[row.supervised]) == "<think>b<|user|>c<|im_end|>"


def test_no_space_creeps_in_where_sentencepiece_would_put_one():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<s>", "</s>", "▁", *"\n<>/s:UAabcdef"]
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    template = (
        "{% for m in messages %}{{ m['role'][0] | upper }}:{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                        chat_template=template)  # fmt: skip
    row = encode(tokenizer, conversation(("a", "b</s>c")), LONG)
    pieces = tokenizer.convert_ids_to_tokens(row.tokens.tolist())
    assert pieces[-7:] == ["b", "<", "/", "s", ">", "c", "</s>"]


def test_text_that_no_tokenizer_reads_is_one_line(tokenizer):
    for call in (encode, prompt_tokens):
        with pytest.raises(UserError, match="the tokenizer cannot read the text: it has an unpaired surrogate"):
            call(tokenizer, conversation(("a \ud83d", "b")), LONG)


# ---------------------------------------------------------------------------------------------- rows of many turns

ALTERNATING = (  # Mistral's: turns must alternate, the system prompt goes into the first, and a space comes with each
    "{{ bos_token }}{% set offset = 1 if messages[0]['role'] == 'system' else 0 %}{% for m in messages[offset:] %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {% if loop.index0 == 0 and offset %}{{ messages[0]['content'] + '\n\n' }}"
    "{% endif %}{{ m['content'] }} [/INST]{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
COUNTING = "{% for m in messages %}{{ messages | length }} {{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"


def long_row(count, system=None, said=lambda turn: f"word {turn}"):
    turns = [{"role": ("user", "assistant")[turn % 2], "content": said(turn)} for turn in range(count)]
    return [{"role": "system", "content": system}, *turns] if system else turns


class Spy:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("template", ["own", "alternating", "default system"])
def test_a_row_of_many_turns_is_what_it_is_with_all_beginnings_rendered(templated, monkeypatch, template, system):
    own = build_tokenizer().chat_template
    made = templated({"own": own, "alternating": ALTERNATING, "default system": DEFAULT_SYSTEM + own}[template])
    row = long_row(70, system, lambda turn: ("", " ", "\n\n", "a <|im_end|> b", "x" * 9)[turn % 5] + f"{turn} ")
    row[20]["content"] = row[21]["content"] = "the same"
    for turn in (5, 33, 69):
        row[turn + bool(system)]["train"] = False
    row.pop()  # ends with a question
    exact = encode_all(made, row)
    monkeypatch.setattr(chat, "_RENDERED_TURNS", 0)
    monkeypatch.setattr(chat, "_spans_by_window", spy := Spy(chat._spans_by_window))
    found = encode_all(made, row)
    assert spy.calls == 1
    assert np.array_equal(found.tokens, exact.tokens) and np.array_equal(found.supervised, exact.supervised)
    assert 100 < found.supervised.sum() < len(found.tokens)


def test_three_thousand_turns_take_time_in_proportion(tokenizer):
    encode_all(tokenizer, long_row(100))
    start = time.process_time()
    encode_all(tokenizer, long_row(600))
    few, start = time.process_time() - start, time.process_time()
    row = encode_all(tokenizer, long_row(3_000))
    assert time.process_time() - start < 15 * few + 0.5, "more than in proportion"
    assert tokenizer.decode(row.tokens[row.supervised]).startswith("word 1<|im_end|>word 3<|im_end|>")
    assert np.count_nonzero(np.diff(row.supervised.astype(int)) == 1) == 1_500


def test_long_rows_that_cannot_be_divided_are_refused(tokenizer, templated):
    with pytest.raises(UserError, match=r"has 10,002 turns, more than the limit of 10,000: split it"):
        encode_all(tokenizer, long_row(10_002))
    for template in (COUNTING, REWRITING):
        with pytest.raises(UserError, match=r"does not render each turn independently|rewrites earlier"):
            encode_all(templated(template), long_row(400))
    only_last = [{**turn, "train": False} for turn in long_row(399)] + long_row(400)[-1:]
    assert encode_all(templated(REWRITING), only_last).supervised.any()
    monologue = [{"role": "user", "content": "a"}, *({"role": "assistant", "content": "b"} for _ in range(600))]
    with pytest.raises(UserError, match=r"more than 512 without a question after an answer: split it"):
        encode_all(tokenizer, monologue)


def test_a_pattern_of_the_tokenizer_that_does_not_end_is_reported():
    from tokenizers import Regex, pre_tokenizers

    made = build_tokenizer()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(UserError, match=r"the tokenizer cannot read the text: .*retry-limit"):
        encode_all(made, [{"role": "user", "content": "a" * 40 + "b"}, {"role": "assistant", "content": "c"}])
