"""sv.score: what eval.py score computes, on rows in memory."""

import pytest

import secvec_jax as sv
from secvec_jax.errors import UserError
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


def test_an_answer_that_is_too_long_to_be_matched_is_refused():
    long = [{"prompt": "Recite.", "response": "word " * 600}]
    with pytest.raises(UserError, match="too many to be matched exactly"):
        sv.score(tiny_model(), harmful=(), benign=(), questions=long)
