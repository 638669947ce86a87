"""What a model scores on a suite, with vectors on and off."""

from secvec_jax.data.chat import encode
from secvec_jax.evaluation import suite as suites
from secvec_jax.evaluation.likelihood import mean_losses
from secvec_jax.evaluation.suite import Suite, outcomes
from secvec_jax.inference import generate

_HARMFUL = ["The quick brown fox", "What is the capital of France?", "def add"]
_BENIGN = ["A security vector says", "12345 + 67890"]


def test_outcomes_are_those_of_the_replies_with_vectors_on_and_off(tiny_model, random_vectors, monkeypatch):
    """Vectors are made part of the weights to be judged, and then do what they do as a guest."""
    model = tiny_model("llama").model
    vectors = random_vectors(model, rank=4)
    rows = [[{"role": "user", "content": p}, {"role": "assistant", "content": "over the dog"}] for p in _HARMFUL]
    targets = [encode(model.tokenizer, row, 128) for row in rows]
    monkeypatch.setattr(suites, "refuses", lambda reply, openings: reply.startswith(tuple(openings)))
    found = []
    for active in (None, vectors):
        replies = generate(model, [*_HARMFUL, *_BENIGN], active, max_new_tokens=6)
        suite = Suite(
            refusals=[replies[1], replies[3]],
            harmful=_HARMFUL,
            benign=_BENIGN,
            questions=[(prompt, generate(model, _HARMFUL, active, max_new_tokens=4)[1]) for prompt in _HARMFUL],
            harmful_targets=targets,
            reply_tokens=6,
            answer_tokens=4,
        )
        outcome = outcomes(model, suite, active)
        assert replies.count(replies[1]) == replies.count(replies[3]) == 1 and replies[1] and replies[3]
        assert outcome["refusal"] == [0, 1, 0] and outcome["over_refusal"] == [1, 0]
        assert outcome["exact_match"][1] == 1.0
        for ours, plain in zip(outcome["harmful_loss"], mean_losses(model, targets, active), strict=True):
            assert abs(ours - plain) < 1e-5
        found.append(outcome)
    assert found[0]["harmful_loss"] != found[1]["harmful_loss"]
