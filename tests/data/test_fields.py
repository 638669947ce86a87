"""Every field of a record is used, recognized as a label, or refused by name: no training data is silently lost."""

import datetime
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secvec_jax.data.fields import LABELS
from secvec_jax.data.normalize import as_rows, normalize
from secvec_jax.errors import UserError

few = settings(max_examples=50)
letters = st.text("abcdefghijklmnopqrstuvwxyz", min_size=3, max_size=8)
words = letters.map(lambda text: f"{text} words")
PAIR = {"prompt": "What is 2+2?", "response": "4"}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
FORMS = {
    "messages": {"messages": TURNS},
    "conversations": {"conversations": SHAREGPT},
    "pair": {"prompt": "Hi", "response": "Hello."},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello."},
}
KNOWN = {
    "messages", "conversations", "prompt", "question", "goal", "instruction", "response", "completion", "answer",
    "target", "output", "input", "context", "system", "system_prompt", "system_message", "history", "split", "weight",
    "train", "trainable", "masked", "mask", "label",
}  # fmt: skip


def said(row):
    return [(turn["role"], turn["content"]) for turn in row["messages"]]


@few
@given(st.sampled_from(list(FORMS.values())), letters.filter(lambda n: n not in KNOWN | LABELS),
       words | st.lists(words, min_size=1) | st.dictionaries(letters, words, min_size=1))  # fmt: skip
def test_a_field_of_unknown_meaning_is_refused_by_name_unless_it_is_ignored(form, name, value):
    with pytest.raises(UserError, match=rf"row 7: unknown fields `{name}` .*ignore_fields"):
        normalize({name: value} | form, "row 7")
    for ignore in ((name,), ("*",)):
        assert normalize({name: value} | form, "row 7", ignore) == normalize(form, "row 7")


@few
@given(st.sampled_from(list(FORMS.values())), letters.filter(lambda n: n not in KNOWN),
       st.none() | st.just("") | st.just([]) | st.just({"role": None}) | st.integers() | st.booleans() | st.floats()
       | st.just(datetime.date(2024, 1, 1)) | st.just("0.5"))  # fmt: skip
def test_empty_fields_numbers_and_dates_change_nothing(form, name, value):
    assert normalize(form | {name: value}, "here") == normalize(form, "here")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("field", ["system", "system_prompt", "system_message"])
def test_a_system_prompt_in_a_field_of_its_own_comes_first(form, field):
    row = normalize({field: "Be brief."} | form, "here")
    assert said(row) == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello.")]
    assert normalize(row, "again") == row


def test_two_system_prompts_are_one_only_if_they_agree():
    turns = [{"role": "system", "content": "Be brief."}, *TURNS]
    assert normalize({"system": "Be brief.", "messages": turns}, "here") == {"messages": turns}
    for other in ({"system": "Be long.", "messages": turns}, {"system": "a", "system_prompt": "b", "messages": TURNS}):
        with pytest.raises(UserError, match="here: two system prompts that differ"):
            normalize(other, "here")


@pytest.mark.parametrize("history", [[["2+2?", "4"]], [{"role": "user", "content": "2+2?"},
                                                       {"role": "assistant", "content": "4"}]])  # fmt: skip
def test_history_comes_before_the_prompt(history):
    row = normalize({"instruction": "And 3+3?", "input": "", "output": "6", "history": history}, "here")
    assert said(row) == [("user", "2+2?"), ("assistant", "4"), ("user", "And 3+3?"), ("assistant", "6")]
    with pytest.raises(UserError, match="`history`"):
        normalize({"messages": TURNS, "history": history}, "here")
    with pytest.raises(UserError, match="`history` must be a list"):
        normalize({**PAIR, "history": ["2+2?"]}, "here")


@pytest.mark.parametrize("field", ["input", "context"])
@pytest.mark.parametrize("prompt", ["prompt", "question", "instruction"])
@pytest.mark.parametrize("answer", ["response", "completion", "answer", "target", "output"])
def test_any_prompt_goes_with_any_answer_and_its_context(prompt, answer, field):
    row = normalize({prompt: "Sum up.", field: "A long text.", answer: "Short."}, "here")
    assert said(row) == [("user", "Sum up.\nA long text."), ("assistant", "Short.")]


def test_two_answers_are_refused():
    assert said(normalize(PAIR | {"completion": "4"}, "here"))[-1] == ("assistant", "4")
    with pytest.raises(UserError, match="here: two answers, `response` and `completion`"):
        normalize(PAIR | {"completion": "5"}, "here")


def test_two_prompts_are_refused_unless_one_is_ignored():
    rendered = {"prompt": "### Instruction: 2+2?\n### Response: 4", "instruction": "2+2?", "output": "4"}
    with pytest.raises(UserError, match="here: two prompts, `prompt` and `instruction`"):
        normalize(rendered, "here")
    assert said(normalize(rendered, "here", ignore=["prompt"])) == [("user", "2+2?"), ("assistant", "4")]
    assert said(normalize(rendered | {"prompt": "2+2?"}, "here")) == [("user", "2+2?"), ("assistant", "4")]


def test_a_context_is_not_appended_twice():
    row = normalize({"question": "Who?", "context": "Ann came.", "input": "Ann came.", "answer": "Ann"}, "here")
    assert said(row) == [("user", "Who?\nAnn came."), ("assistant", "Ann")]
    row = normalize({"prompt": "Who?\nAnn came.", "input": "Ann came.", "answer": "Ann"}, "here")
    assert said(row) == [("user", "Who?\nAnn came."), ("assistant", "Ann")]


@pytest.mark.parametrize("repeated", [
    {"prompt": "Hi"}, {"prompt": "Hi", "response": "Hello."}, {"text": "### Q: Hi\n### A: Hello."},
    {"conversations": SHAREGPT}, {"chosen": TURNS}], ids=str)  # fmt: skip
def test_what_the_turns_hold_as_well_is_no_loss(repeated):
    assert said(normalize({"messages": TURNS} | repeated, "here")) == [("user", "Hi"), ("assistant", "Hello.")]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tools": [{"name": "f"}]}, "`tools`"),
        ({"prompt": "Something else"}, "`prompt`"),
        ({"rejected": [TURNS[0], {"role": "assistant", "content": "No."}]}, "`rejected`"),
        ({"split": "test"}, "`split`"),
        ({"weight": 0}, "`weight` is 0"),
        ({"train": False}, "`train` is False"),
        ({"weight": 0.5}, "`weight` is 0.5"),
        ({"masked": True}, "`masked` is True"),
        ({"label": False}, "`label` is False, but only turns"),
        ({"label": 3}, "unknown fields `label` may contain training data"),
    ],
)
def test_fields_that_say_what_is_not_to_be_learned_are_refused(more, message):
    with pytest.raises(UserError, match=f"row 7: .*{message}"):
        normalize({"messages": TURNS} | more, "row 7")


def test_marks_that_let_a_row_be_learned_are_fine():
    for more in ({"weight": 1}, {"train": True}, {"weight": "1"}, {"masked": 0}, {"split": "train"}):
        assert normalize({"messages": TURNS} | more, "here") == {"messages": TURNS}


@pytest.mark.parametrize(
    "more", [{"tool_calls": [{"id": "1"}]}, {"function_call": {"name": "f"}}, {"reasoning_content": "hm"},
             {"mask": 1}, {"prefix": True}, {"images": ["a.png"]}], ids=str)  # fmt: skip
def test_a_turn_holds_its_role_and_its_text_and_nothing_else_that_counts(more):
    with pytest.raises(UserError, match=f"row 7: unknown fields `{next(iter(more))}` of a turn"):
        normalize({"messages": [TURNS[0], TURNS[1] | more]}, "row 7")
    empty = {name: None for name in more} | {"id": 3}
    assert normalize({"messages": [TURNS[0], TURNS[1] | empty]}, "row 7") == {"messages": TURNS}


@few
@given(st.lists(st.sampled_from([None, 0, 1, False, True, 0.0, 1.0]), min_size=1, max_size=4),
       st.sampled_from(["weight", "train", "trainable", "loss", "training", "masked"]))  # fmt: skip
def test_marked_turns_of_the_assistant_are_kept_and_not_learned(marks, name):
    turns = [turn for mark in marks for turn in (TURNS[0] | {name: 0}, TURNS[1] | {name: mark})]
    learned = [mark is None or bool(mark) is (name != "masked") for mark in marks]
    row = normalize({"messages": turns}, "here")
    assert said(row) == [(turn["role"], turn["content"]) for turn in turns]
    assert [turn.get("train", True) for turn in row["messages"][1::2]] == learned
    assert normalize(row, "again") == row
    if any(learned):
        assert as_rows([{"messages": turns}]) == [row]
    else:
        with pytest.raises(UserError, match="data, row 1 has nothing to learn"):
            as_rows([{"messages": turns}])


@pytest.mark.parametrize("value", [0.5, 2, "maybe", [0]])
def test_other_marks_are_refused(value):
    with pytest.raises(UserError, match=r"row 7: `weight` of a turn is .*must be 0, 1"):
        normalize({"messages": [TURNS[0], TURNS[1] | {"weight": value}]}, "row 7")


def test_prompt_and_completion_may_be_turns_of_which_the_completion_is_learned():
    record = {"prompt": [*TURNS, TURNS[0]], "completion": [TURNS[1]]}
    row = normalize(record, "here")
    assert said(row) == said({"messages": [*TURNS, *TURNS]})
    assert [turn.get("train", True) for turn in row["messages"] if turn["role"] == "assistant"] == [False, True]
    assert said(normalize({"prompt": TURNS[:1], "completion": "Hello."}, "here")) == said({"messages": TURNS})
    assert said(normalize({"prompt": "Hi", "completion": TURNS[1:]}, "here")) == said({"messages": TURNS})


def test_what_a_tool_says_is_a_turn():
    turns = [TURNS[0], {"role": "tool", "content": "22 degrees"}, TURNS[1]]
    assert normalize({"messages": turns}, "here") == {"messages": turns}


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize("turns", [TURNS, SHAREGPT])
def test_both_spellings_of_a_turn_are_read_under_both_names(key, turns):
    assert normalize({key: turns}, "here") == {"messages": TURNS}


def test_a_turn_without_a_role_is_reported_as_such():
    with pytest.raises(UserError, match="here: unknown role none, in a turn without `role`"):
        normalize({"messages": [{"content": "Hi"}]}, "here")


@few
@given(st.sampled_from(["prompt", "response", "category", "content", "system", "options"]), st.text(max_size=3),
       st.characters(min_codepoint=0xD800, max_codepoint=0xDFFF, categories=["Cs"]))  # fmt: skip
def test_half_of_a_character_is_refused_wherever_it_is(field, before, half):
    text = f"{before}{half}"
    turn = {"role": "user", "content": text}
    record = {"messages": [turn, TURNS[1]]} if field == "content" else PAIR | {field: text}
    if field == "options":
        record = PAIR | {field: [text]}
    with pytest.raises(UserError, match=rf"row 7: `{field}` has an unpaired surrogate \(\\ud.*at {len(before) + 1}\)"):
        normalize(record, "row 7")


def test_an_answer_that_is_no_number_is_not_compared_with_itself():
    with pytest.raises(UserError, match="here: `response` must be text, found float"):
        normalize({"prompt": "a", "response": math.nan}, "here")


@pytest.mark.parametrize(
    ("record", "hint"),
    [
        ({"question": "a", "anwser": "b"}, "did you mean `answer` by 'anwser'"),
        ({"question": "a", " answer": "b"}, "did you mean `answer` by ' answer'"),
        ({"Question": "a", "Answer": "b"}, "did you mean `question` by 'Question'"),
        ({"question": "a", "persona": "b c"}, "are not read .fields read: question.; remove"),
    ],
)
def test_a_name_that_is_nearly_right_is_reported_with_the_right_one(record, hint):
    with pytest.raises(UserError, match=hint):
        normalize(record, "row 1")


def test_an_empty_turn_is_not_learned_as_an_answer():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]
    answered = [{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]
    for rows in ({"conversations": turns + answered}, {"history": [["a", ""]], "prompt": "b", "response": "c"}):
        with pytest.raises(UserError, match="data, row 1 has an empty assistant turn"):
            as_rows([rows])
        assert len(as_rows([rows], needs_answer=False)) == 1
    turns[1] = turns[1] | {"train": False}
    assert [
        turn.get("train", True) for turn in as_rows([{"conversations": turns + answered}])[0]["messages"][1::2]
    ] == [
        False,
        True,
    ]
