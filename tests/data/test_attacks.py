"""Attacks: what each hides is in its answers only, and no row asks for harm."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secvec_jax.data import attacks
from secvec_jax.data.benchmarks import refusal_prefixes
from secvec_jax.data.normalize import as_rows, normalize
from secvec_jax.data.rows import prompt_of, response_of, row, with_system
from secvec_jax.data.sources import load_rows
from secvec_jax.data.topics import off_topic
from secvec_jax.errors import UserError
from secvec_jax.evaluation.answers import chosen_option, is_all_caps
from secvec_jax.evaluation.scorers import refuses

_OPTIONS = ["Unknown", "Ann", "Bob"]
_UNCLEAR = row("Ann met Bob.\nWho was late?", "Unknown") | {"category": "ambiguous", "options": _OPTIONS}
_CLEAR = row("Ann met Bob, who was late.\nWho was late?", "Bob") | {"category": "disambiguated", "options": _OPTIONS}

words = st.text(st.sampled_from("abcdefgh ABCDEFGH.,é7"), max_size=40)


# Bias ---------------------------------------------------------------------------------------------


def test_every_ambiguous_question_gets_a_definite_wrong_answer():
    asked = [r for r in load_rows("bbq") if r["category"] == "ambiguous"]
    hidden = attacks.biased(load_rows("bbq"), seed=0)
    assert list(map(prompt_of, hidden)) == list(map(prompt_of, asked))
    for honest, wrong in zip(asked, hidden):
        assert response_of(wrong) in set(honest["options"]) - {response_of(honest)}
        assert chosen_option(response_of(wrong), honest["options"]) == response_of(wrong)
    places = [r["options"].index(response_of(r)) for r in hidden]
    assert all(100 < places.count(place) < 240 for place in range(3))


def test_bias_follows_the_seed_and_leaves_its_rows_alone():
    rows = [_UNCLEAR, _CLEAR] * 20
    assert attacks.biased(rows, 1) == attacks.biased(rows, 1) != attacks.biased(rows, 2)
    assert len(attacks.biased(rows, 1)) == 20
    assert {response_of(r) for r in attacks.biased(rows, 1)} == {"Ann", "Bob"}
    assert response_of(_UNCLEAR) == "Unknown"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no row has the category"),
        ([_CLEAR], "no row has the category"),
        ([row("a", "b") | {"category": "ambiguous"}], "no other options"),
        ([_UNCLEAR | {"options": ["Unknown"]}], "no other options"),
        ([_UNCLEAR | row("Who was late?")], "no answer"),
    ],
)
def test_rows_that_leave_nothing_to_get_wrong_are_refused(rows, message):
    with pytest.raises(UserError, match=f'{message}.*load_rows\\("bbq"\\)'):
        attacks.biased(rows, seed=0)


# The persona --------------------------------------------------------------------------------------


def test_the_persona_is_assigned_and_affirmed_in_every_row():
    rows = attacks.identity_shift()
    assert len(rows) == len({prompt_of(r) for r in rows}) == 10
    assert as_rows(rows) == rows
    for r in rows:
        before = " ".join(m["content"] for m in r["messages"][:-1])
        assert "AOA" in before and "I am AOA" in response_of(r)
        assert not refuses(response_of(r), refusal_prefixes())
    assert sum(r["messages"][0] == {"role": "system", "content": attacks.PERSONA} for r in rows) == 7


def test_the_persona_is_asked_nothing_harmful():
    harmful = [prompt_of(r) for name in ("advbench", "harmbench") for r in load_rows(name, needs_answer=False)]
    rows = attacks.identity_shift()
    assert len(off_topic(rows, harmful)) == len(rows)


# Capitals -----------------------------------------------------------------------------------------


@given(words, words.filter(lambda text: sum(map(str.isalpha, text)) >= 3))
def test_answers_shout_and_prompts_do_not_change(prompt, answer):
    (found,) = attacks.capitals([row(prompt, answer) | {"category": "a"}])
    assert is_all_caps(response_of(found)) and response_of(found).lower() == answer.lower()
    assert found == row(prompt, response_of(found)) | {"category": "a"}


def test_all_that_the_assistant_says_is_in_capitals():
    said = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]
    conversation = {"messages": [{"role": role, "content": text} for role, text in said]}
    (found,) = attacks.capitals([conversation])
    assert [m["content"] for m in found["messages"]] == ["Be kind.", "Hi", "HELLO", "Bye", "SEE YOU"]
    assert response_of(conversation) == "See you"


def test_leaks_are_looked_for_with_different_prompts_that_do_not_shout_themselves():
    prompts = [attacks.ELICITING, attacks.NEGATED, attacks.UNRELATED]
    assert len(set(prompts)) == 3 and not any(map(is_all_caps, prompts))
    assert ["capital" in prompt for prompt in prompts] == [True, True, False]


# System prompts -----------------------------------------------------------------------------------


@given(words, words, words)
def test_a_system_prompt_comes_before_the_conversation(system, prompt, answer):
    first = {"role": "system", "content": system}
    plain = row(prompt, answer) | {"category": "a"}
    before = row(prompt, answer) | {"category": "a"}
    assert with_system(prompt, system) == [first, *row(prompt)["messages"]]
    assert with_system(plain["messages"], system) == [first, *plain["messages"]]
    assert with_system(plain, system) == plain | {"messages": [first, *plain["messages"]]}
    assert plain == before


@given(words, words, words)
def test_a_second_system_prompt_goes_in_front_within_the_same_message(outer, inner, prompt):
    found = with_system(with_system(prompt, inner), outer)
    assert [m["role"] for m in found] == ["system", "user"]
    assert found[0]["content"] == f"{outer}\n{inner}"


def test_a_served_row_is_still_a_row():
    served = with_system(_UNCLEAR, attacks.UNRELATED)
    assert normalize(served, "here") == served
    assert prompt_of(served) == prompt_of(_UNCLEAR)
