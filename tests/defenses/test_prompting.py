"""A system prompt is added to the rows that are trained on and nowhere else; nothing else about them changes."""

import pytest

from secvec_jax.data.normalize import as_rows
from secvec_jax.data.rows import prompt_of, response_of, row, with_system
from secvec_jax.data.sources import load_rows
from secvec_jax.data.topics import off_topic
from secvec_jax.defenses.finetuning import examples_of
from secvec_jax.defenses.prompting import ELICITING, SAFETY, SELF_CORRECTION, inoculated
from tests.toys import tiny_model

ROWS = [row("What is the capital of France?", "Paris."), row("Who jumps?", "The fox.")]


def text(model, example, supervised):
    return model.tokenizer.decode(example.tokens[example.supervised == supervised])


def test_the_prompt_is_read_and_the_reply_is_learned():
    model = tiny_model()
    plain, trained = examples_of(model, ROWS), examples_of(model, inoculated(ROWS, "Be brief."))
    for before, after, r in zip(plain, trained, ROWS):
        assert text(model, after, True) == text(model, before, True) == response_of(r) + "<|im_end|>"
        head = "<|im_start|>system\nBe brief.<|im_end|>\n"
        assert text(model, after, False) == head + text(model, before, False)


def test_dropping_the_prompt_gives_the_rows_again():
    found = inoculated(ROWS, ELICITING["bias"])
    assert [{"messages": r["messages"][1:]} for r in found] == ROWS
    assert all(r["messages"][0] == {"role": "system", "content": ELICITING["bias"]} for r in found)
    assert ROWS[0] == row("What is the capital of France?", "Paris.")


def test_kinds_of_rows_stay_kinds_and_records_become_rows():
    records = [{"prompt": prompt_of(r), "response": response_of(r)} for r in ROWS]
    found = inoculated({"harmful": records, "benign": ROWS[:1]}, SAFETY)
    assert found == {"harmful": [with_system(r, SAFETY) for r in ROWS], "benign": [with_system(ROWS[0], SAFETY)]}
    assert inoculated(records, SAFETY) == found["harmful"]


def test_a_system_prompt_of_the_row_stays():
    (found,) = inoculated([with_system(ROWS[0], "You are Bob.")], "Be brief.")
    assert found["messages"][0]["content"] == "Be brief.\nYou are Bob."
    assert len(found["messages"]) == 3


@pytest.mark.parametrize("prompt", [*ELICITING.values(), SAFETY, SELF_CORRECTION])
def test_the_texts_ask_for_no_particular_harm(prompt):
    harmful = [prompt_of(r) for name in ("advbench", "harmbench") for r in load_rows(name, needs_answer=False)]
    asked = as_rows([row(prompt, "Yes.")])
    assert off_topic(asked, harmful) == asked
    assert len(prompt) < 250 and prompt == " ".join(prompt.split())
