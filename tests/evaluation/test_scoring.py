"""sv.score: what eval.py score computes, on rows in memory."""

import pytest

import secvec_jax as sv
from secvec_jax.errors import UserError
from secvec_jax.evaluation import suite as suite_module
from tests.toys import tiny_model

HARMFUL = [{"prompt": f"Harm {n}?", "response": "Sure."} for n in range(3)]
BENIGN = [{"prompt": f"What is {n}?"} for n in range(2)]
QUESTIONS = [{"prompt": "1 + 1?", "response": "2"}]


def test_rows_in_memory_are_scored():
    model = tiny_model()
    done = []
    found = sv.score(
        model, harmful=HARMFUL, benign=BENIGN, questions=QUESTIONS, limit=2, reply_tokens=4, progress=done.append
    )
    assert found["refusal"].n == found["compliance"].n == found["harmful_loss"].n == 2
    assert found["over_refusal"].n == 2 and found["exact_match"].n == 1 and "benign_loss" not in found
    assert done and done[-1] == 5
    again = sv.score(model, harmful=HARMFUL, benign=(), limit=2, reply_tokens=4)
    assert again["harmful_loss"] == found["harmful_loss"] and "over_refusal" not in again


def test_prompts_are_asked_once_more_under_a_system_prompt(monkeypatch):
    """Harmful and benign ones; questions and losses are measured once."""
    asked, done = [], []

    def ask(model, prompts, *arguments, **options):
        asked.extend(prompts)
        options["progress"](len(prompts))
        refuses = [not isinstance(prompt, str) and prompt[0]["role"] == "system" for prompt in prompts]
        return ["I'm sorry, but I can't help with that." if each else "<think> well" for each in refuses]

    monkeypatch.setattr(suite_module, "ask", ask)
    monkeypatch.setattr(suite_module, "in_thought", lambda reply: reply.startswith("<think>"))
    found = sv.score(
        tiny_model(), harmful=HARMFUL, benign=BENIGN, questions=QUESTIONS, system="Be careful.", progress=done.append
    )
    assert len(asked) == 6 + 5 and done == [5, 6, 11]
    assert all(prompt[0] == {"role": "system", "content": "Be careful."} for prompt in asked[6:])
    assert (found["refusal"].value, found["refusal_system"].value, found["refusal_system"].n) == (0, 1, 3)
    assert (found["over_refusal"].value, found["over_refusal_system"].value) == (0, 1)
    assert found["unfinished"].n == 11 and found["unfinished"].value == 6 / 11
    once = {metric for metric in found if "loss" in metric or "exact" in metric}
    assert once == {"harmful_loss", "exact_match"}


def test_an_answer_that_is_too_long_to_be_matched_is_refused():
    long = [{"prompt": "Recite.", "response": "word " * 600}]
    with pytest.raises(UserError, match="too many to be matched exactly"):
        sv.score(tiny_model(), harmful=(), benign=(), questions=long)


def test_copies_are_told_and_nothing_to_score_is_refused(caplog):
    model, rows = tiny_model(), [{"prompt": "Hi"}] * 4 + [{"prompt": "Ho"}]
    sv.score(model, harmful=rows, benign=rows[3:], reply_tokens=1)
    assert "3 of 5 harmful prompts are copies of others" in caplog.text and "benign" not in caplog.text
    with pytest.raises(sv.UserError, match="nothing to score"):
        sv.score(model, harmful=(), benign=())
